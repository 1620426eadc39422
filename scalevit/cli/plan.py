"""`scalevit plan`: reads its arguments, prints an estimate as tables or as JSON."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from scalevit.cli.parsing import add_config, integer
from scalevit.config.loading import load_config
from scalevit.errors import SettingError, UserError, naming_settings
from scalevit.planning.devices import device_names, load_device
from scalevit.terminal import print_table

if TYPE_CHECKING:
    from scalevit.planning.estimate import EstimateRow, RunEstimate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--gpus",
        type=_numbers,
        required=True,
        help="devices over all nodes, one rank each; several numbers (1,2,8) compare them for the config's own engine",
    )
    parser.add_argument("--nodes", type=integer(1), default=1, help="number of nodes (default: %(default)s)")
    parser.add_argument(
        "--device",
        default="h200",
        help=f"{', '.join(device_names())}, or a FILE.json with your own numbers (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Prints the estimate.

    Raises:
        UserError: as `load_config`, `load_device` and `estimate_run`.
    """
    config = load_config(arguments.config, arguments.overrides)
    with _naming_options():
        device = load_device(arguments.device)
    # Imported late: the mistakes above are reported before torch and timm are loaded, which takes seconds.
    from scalevit.planning.estimate import estimate_run
    from scalevit.training.optimizers import optimizer_refusals, state_tensors
    from scalevit.training.setting_keys import OPTIMIZATION_KEYS

    with _naming_options(), naming_settings(OPTIMIZATION_KEYS):
        estimates = [
            estimate_run(
                config,
                device,
                gpus=gpus,
                nodes=arguments.nodes,
                optimizer_tensors=len(state_tensors(config.optimizer.name, config.optimizer.args)),
                optimizer_refusals=optimizer_refusals(config.optimizer),
                compare=len(arguments.gpus) == 1,
            )
            for gpus in arguments.gpus
        ]
    if arguments.json:
        content = [_as_json(estimate) for estimate in estimates]
        print(json.dumps(content if len(content) > 1 else content[0], indent=1))
    elif len(estimates) > 1:
        print_table(_scaling_table(estimates), *_notes(estimates[0]))
    else:
        _print(estimates[0])


def _numbers(text: str) -> list[int]:
    return [integer(1)(part) for part in text.split(",")]


@contextmanager
def _naming_options() -> Iterator[None]:
    """Names the command line's option where an argument of the library has its name."""
    try:
        yield
    except SettingError as error:
        if error.argument not in ("gpus", "nodes", "device"):
            raise
        raise UserError(f"--{error.argument} {error.value}: {error.reason}") from error


def _print(estimate: "RunEstimate") -> None:
    print_table(_activation_table(estimate))
    print_table(_engine_table(estimate), *_notes(estimate))


def _activation_table(estimate: "RunEstimate") -> Table:
    batch, precision = estimate.activations_of, estimate.config.train.precision
    table = Table(title=f"activations of {batch} images, GB: kept for the backward / at the peak ({precision})")
    for heading in ("strategy", "activation checkpointing"):
        table.add_column(heading)
    for mode in next(iter(estimate.activations.values())):
        table.add_column(mode, justify="right")
    for strategy, modes in estimate.activations.items():
        for checkpointing in (False, True):
            cells = (traces[checkpointing] for traces in modes.values())
            shown = [f"{cell.saved_bytes / 1e9:.3f} / {cell.peak_bytes / 1e9:.3f}" for cell in cells]
            table.add_row(strategy, "on" if checkpointing else "off", *shown)
    return table


def _engine_table(estimate: "RunEstimate") -> Table:
    config, train = estimate.config, estimate.config.train
    where = f"{estimate.gpus} x {estimate.device.name}" + (f" on {estimate.nodes} nodes" if estimate.nodes > 1 else "")
    recomputing = ", activation checkpointing" if train.activation_checkpointing else ""
    title = f"{config.model.name} on {where}, global batch {train.global_batch}, {train.precision}, MLP {estimate.mode}"
    table = Table(title=title + recomputing)
    for heading in ("strategy", "engine"):
        table.add_column(heading)
    for heading in (
        "parameters", "micro-\nbatch", "padding", "weights", "optimizer", "gradients", "EMA", "buffers", "activations",
        "GB", "fits", "largest\nmicro-batch", "GB sent\nper step", "steps/s", "images/s", "bound by",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for index, row in enumerate(estimate.rows):
        memory = row.cost.memory
        sizes = (memory.weights, memory.optimizer, memory.gradients, memory.ema, memory.backward_buffers)
        table.add_row(
            row.strategy,
            row.engine,
            f"{row.parameters:,}",
            _micro_batches(row),
            f"{row.padding:.1%}",
            *(f"{size / 1e9:.3f}" for size in (*sizes, row.activation_bytes)),
            f"{row.memory_bytes / 1e9:.2f}",
            "yes" if row.fits else "no",
            str(row.largest_micro_batch or "none"),
            f"{row.bytes_sent / 1e9:.3f}",
            f"{row.steps_per_second:.3g}",
            f"{row.steps_per_second * train.global_batch:,.0f}",
            row.bound_by,
            end_section=index + 1 == len(estimate.rows) or estimate.rows[index + 1].strategy != row.strategy,
        )
    return table


def _micro_batches(row: "EstimateRow") -> str:
    return f"{row.accumulation} x {row.micro_batch}"


def _scaling_table(estimates: Sequence["RunEstimate"]) -> Table:
    """The config's own reduction and engine on several numbers of devices."""
    config = estimates[0].config
    own = config.reduction.strategy, config.engine.label
    table = Table(
        title=f"{config.model.name}, {', '.join(own)}, on {estimates[0].device.name}, global batch "
        f"{config.train.global_batch}, {config.train.precision}"
    )
    for heading in (
        "GPUs", "images\nper rank", "padding", "GB", "fits", "largest\nmicro-batch", "GB sent\nper step", "steps/s",
        "images/s", "bound by",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for estimate in estimates:
        row = next(row for row in estimate.rows if (row.strategy, row.engine) == own)
        table.add_row(
            str(estimate.gpus),
            _micro_batches(row),
            f"{row.padding:.1%}",
            f"{row.memory_bytes / 1e9:.2f}",
            "yes" if row.fits else "no",
            str(row.largest_micro_batch or "none"),
            f"{row.bytes_sent / 1e9:.3f}",
            f"{row.steps_per_second:.3g}",
            f"{row.steps_per_second * config.train.global_batch:,.0f}",
            row.bound_by,
        )
    return table


def _notes(estimate: "RunEstimate") -> list[str]:
    device = estimate.device
    notes = [
        *_savings(estimate),
        "Bytes per rank; GB = 1e9 bytes. Buffers: gathered parameters and gradient buckets (DeepSpeed's are 2 GB each "
        "unless engine.native.zero_optimization.reduce_bucket_size is lower). Sent: by each rank, ring algorithms.",
        f"{device.name}: {device.memory_bytes / 1e9:g} GB, {device.usable_memory:.0%} of it usable; "
        f"{device.flops_16bit / 1e12:g} / {device.flops_32bit / 1e12:g} TFLOP/s (16 / 32 bit) at "
        f"{device.compute_share:.0%}; {device.memory_bandwidth / 1e12:g} TB/s at {device.memory_share:.0%}; links "
        f"{device.link_bandwidth / 1e9:g}, network {device.network_bandwidth / 1e9:g} GB/s at {device.link_share:.0%}. "
        f"Source: {device.source or 'the given file'}. The percentages are assumptions, so steps/s are estimates; data "
        "loading is not included.",
        "Micro-batch: micro-batches per rank and step x images; results do not depend on it. Padding: rows of weight 0 "
        "where ranks and micro-batches do not divide the global batch, as a fraction of it.",
    ]
    if estimate.not_estimated:
        notes.append(f"not estimated, the numbers are those without: {', '.join(estimate.not_estimated)}")
    notes += [f"left out: {strategy} ({reason})" for strategy, reason in estimate.left_out.items()]
    engines_of: dict[str, list[str]] = {}
    for engine, reason in estimate.engines_left_out.items():
        engines_of.setdefault(reason, []).append(engine)
    optimizer = estimate.config.optimizer.name
    return notes + [
        f"left out: {', '.join(engines)} (optimizer.name = {optimizer}: {reason})"
        for reason, engines in engines_of.items()
    ]


def _savings(estimate: "RunEstimate") -> list[str]:
    """Each reduction against the first, which is the unreduced model, with the config's own engine."""
    baseline, *others = (row for row in estimate.rows if row.engine == estimate.config.engine.label)
    lines = []
    for row in others:
        traffic, full = row.cost.traffic, baseline.cost.traffic
        less = [f"{1 - row.parameters / baseline.parameters:.1%} fewer parameters"]
        less.append(f"{1 - traffic.gradients / full.gradients:.1%} less gradient traffic")
        if full.all_gather:
            less.append(f"{1 - traffic.all_gather / full.all_gather:.1%} less parameter traffic")
        lines.append(f"{row.strategy} against {baseline.strategy}: {', '.join(less)} ({row.engine})")
    return lines


def _as_json(estimate: "RunEstimate") -> dict[str, Any]:
    return {
        "config": estimate.config.model_dump(mode="json"),
        "device": estimate.device.model_dump(mode="json"),
        "gpus": estimate.gpus,
        "nodes": estimate.nodes,
        "activations_of": estimate.activations_of,
        "mlp": estimate.mode,
        "rows": [asdict(row) for row in estimate.rows],
        "activations": [
            {"strategy": strategy, "mlp": mode, "activation_checkpointing": checkpointing, **asdict(cell)}
            for strategy, modes in estimate.activations.items()
            for mode, traces in modes.items()
            for checkpointing, cell in traces.items()
        ],
        "not_estimated": estimate.not_estimated,
        "left_out": estimate.left_out,
        "engines_left_out": estimate.engines_left_out,
    }
