"""`scalevit plan`: reads its arguments, prints a plan as tables or as JSON."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from rich.table import Table

from scalevit.config.loading import load_config
from scalevit.terminal import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a JSON file, see configs/")
    parser.add_argument("--gpus", type=int, required=True, help="devices over all nodes, one rank each")
    parser.add_argument("--nodes", type=int, default=1, help="that they stand in (default: %(default)s)")
    parser.add_argument(
        "--device", default="h200", help="h200, h100, a100, cpu, or a FILE.json with your own numbers (default: h200)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the file's")


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan.

    Raises:
        UserError: as `load_config`, `load_device` and `make_plan`.
    """
    config = load_config(arguments.config, arguments.overrides)
    from scalevit.planning.devices import load_device
    from scalevit.planning.estimate import make_plan

    plan = make_plan(config, load_device(arguments.device), gpus=arguments.gpus, nodes=arguments.nodes)
    if arguments.json:
        print(json.dumps(_as_json(plan), indent=1))
    else:
        _print(plan)


def _print(plan: Any) -> None:
    config, device = plan.config, plan.device
    train = config.train
    where = f"{plan.gpus} x {device.name}" + (f" in {plan.nodes} nodes" if plan.nodes > 1 else "")
    batches = f"global batch {train.global_batch} = {train.micro_batch} x {plan.gpus} x {plan.accumulation}"
    recomputing = ", activation checkpointing" if train.activation_checkpointing else ""
    table = Table(title=f"{config.model.name} on {where}, {batches}, {train.precision}, MLP {plan.mode}{recomputing}")
    for heading in ("strategy", "engine"):
        table.add_column(heading)
    for heading in (
        "parameters", "weights", "optimizer", "gradients", "EMA", "buffers", "activations", "GB", "fits",
        "largest\nmicro-batch", "GB sent\na step", "steps/s", "images/s", "bound by",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for index, row in enumerate(plan.rows):
        held = row.held
        parts = (held.weights, held.optimizer, held.gradients, held.ema, held.backward_buffers, row.activation_bytes)
        table.add_row(
            row.strategy,
            row.engine,
            f"{row.parameters:,}",
            *(f"{bytes_ / 1e9:.3f}" for bytes_ in parts),
            f"{row.memory_bytes / 1e9:.2f}",
            "yes" if row.fits else "no",
            str(row.largest_micro_batch or "none"),
            f"{row.wire_bytes / 1e9:.3f}",
            f"{row.steps_per_second:.3g}",
            f"{row.steps_per_second * train.global_batch:,.0f}",
            row.bound_by,
            end_section=index + 1 == len(plan.rows) or plan.rows[index + 1].strategy != row.strategy,
        )
    kept = Table(title=f"activations of one micro-batch, GB: kept for the backward / at the peak ({train.precision})")
    kept.add_column("strategy")
    kept.add_column("activation checkpointing")
    for mode in next(iter(plan.activations.values())):
        kept.add_column(mode, justify="right")
    for strategy, modes in plan.activations.items():
        for checkpointing in (False, True):
            cells = (traces[checkpointing] for traces in modes.values())
            shown = [f"{cell.saved_bytes / 1e9:.3f} / {cell.peak_bytes / 1e9:.3f}" for cell in cells]
            kept.add_row(strategy, "on" if checkpointing else "off", *shown)
    print_table(kept)
    print_table(table, *_notes(plan))


def _notes(plan: Any) -> list[str]:
    device = plan.device
    notes = [
        "Bytes per rank; GB = 1e9 bytes. Buffers: gathered parameters and gradient buckets (DeepSpeed's are 2 GB each "
        "unless engine.native.zero_optimization.reduce_bucket_size says less). Sent: by each rank, ring algorithms.",
        f"{device.name}: {device.memory_bytes / 1e9:g} GB, {device.usable_memory:.0%} of it usable; "
        f"{device.flops_16bit / 1e12:g} / {device.flops_32bit / 1e12:g} TFLOP/s (16 / 32 bit) at "
        f"{device.compute_share:.0%}; {device.memory_bandwidth / 1e12:g} TB/s at {device.memory_share:.0%}; links "
        f"{device.link_bandwidth / 1e9:g}, network {device.network_bandwidth / 1e9:g} GB/s at {device.link_share:.0%}. "
        f"Source: {device.source or 'the given file'}. The shares are assumptions, so steps/s are estimates; the "
        "loader is left out.",
        "A larger micro-batch changes the run's numbers (mixup mixes within it).",
    ]
    baseline = {row.engine: row for row in plan.rows if row.strategy == "none"}
    for row in plan.rows:
        if row.strategy == "grouped" and row.engine == "ZeRO 1" and row.engine in baseline:
            other = baseline[row.engine]
            notes.insert(
                0,
                f"grouped against none: {1 - row.parameters / other.parameters:.1%} fewer parameters, "
                f"{_less(row.sent.gradients, other.sent.gradients)} gradient and "
                f"{_less(row.sent.all_gather, other.sent.all_gather)} parameter traffic (ZeRO 1).",
            )
    if plan.not_estimated:
        notes.append(f"not estimated, the numbers are those without: {', '.join(plan.not_estimated)}")
    return notes + [f"left out: {strategy} ({reason})" for strategy, reason in plan.left_out.items()]


def _less(value: float, than: float) -> str:
    return f"{1 - value / than:.1%} less"


def _as_json(plan: Any) -> dict[str, Any]:
    return {
        "config": plan.config.model_dump(mode="json"),
        "device": plan.device.model_dump(mode="json"),
        "gpus": plan.gpus,
        "nodes": plan.nodes,
        "accumulation": plan.accumulation,
        "mlp": plan.mode,
        "rows": [asdict(row) for row in plan.rows],
        "activations": [
            {"strategy": strategy, "mlp": mode, "activation_checkpointing": checkpointing, **asdict(cell)}
            for strategy, modes in plan.activations.items()
            for mode, traces in modes.items()
            for checkpointing, cell in traces.items()
        ],
        "not_estimated": plan.not_estimated,
        "left_out": plan.left_out,
    }
