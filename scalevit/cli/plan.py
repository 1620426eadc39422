"""`scalevit plan`: reads its arguments, prints an estimate as tables or as JSON."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from scalevit.cli import plan_tables
from scalevit.cli.parsing import add_config, integer
from scalevit.config.loading import load_config
from scalevit.errors import SettingError, UserError, naming_settings
from scalevit.planning.devices import device_names, load_device
from scalevit.terminal import print_notes, print_table, progress_text

if TYPE_CHECKING:
    from scalevit.config.tree import Config
    from scalevit.planning.devices import Device
    from scalevit.planning.estimate import RunEstimate


EXAMPLES = """\
  scalevit plan --config grouped --gpus 8
  scalevit plan --config grouped --gpus 1,2,8 --device h100      # compare numbers of GPUs
  scalevit plan --config fsdp --gpus 16 --nodes 2 train.micro_batch=128"""


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
    with progress_text("loading torch and timm") as report:
        estimates = _estimates(config, device, arguments, report)
    if arguments.json:
        content = [_as_json(estimate) for estimate in estimates]
        print(json.dumps(content if len(content) > 1 else content[0], indent=1))
    elif len(estimates) > 1:
        print_table(plan_tables.scaling(estimates))
        print_notes(["", *plan_tables.notes(estimates[0])])
    else:
        _print(estimates[0])


def _estimates(
    config: "Config", device: "Device", arguments: argparse.Namespace, report: Callable[[str], None]
) -> "list[RunEstimate]":
    # Imported late: mistakes in arguments are reported before torch and timm are loaded, which takes seconds.
    from scalevit.planning.estimate import estimate_run
    from scalevit.training.optimizers import optimizer_refusals, state_tensors
    from scalevit.training.setting_keys import OPTIMIZATION_KEYS

    with _naming_options(), naming_settings(OPTIMIZATION_KEYS):
        return [
            estimate_run(
                config,
                device,
                gpus=gpus,
                nodes=arguments.nodes,
                optimizer_tensors=len(state_tensors(config.optimizer.name, config.optimizer.args)),
                optimizer_refusals=optimizer_refusals(config.optimizer),
                compare=len(arguments.gpus) == 1,
                report=lambda part: report(f"estimating: {part}"),
            )
            for gpus in arguments.gpus
        ]


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
    print_table(plan_tables.comparison(estimate))
    print_notes(["", plan_tables.suggestion(estimate), *plan_tables.savings(estimate), ""])
    print_table(plan_tables.memory(estimate))
    print_notes([""])
    print_table(plan_tables.activations(estimate))
    print_notes(["", *plan_tables.notes(estimate)])


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
            {"mlp": mode, "activation_checkpointing": checkpointing, **asdict(cell)}
            for (mode, checkpointing), cell in estimate.activations.items()
        ],
        "not_estimated": estimate.not_estimated,
        "left_out": estimate.left_out,
        "engines_left_out": estimate.engines_left_out,
    }
