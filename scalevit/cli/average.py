"""`scalevit average`: averages weights, evaluated before and after."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from scalevit.cli.parsing import add_weight_set
from scalevit.errors import UserError
from scalevit.export.source import Source, find_source
from scalevit.files import check_new
from scalevit.terminal import narrow_table, print_table

if TYPE_CHECKING:
    from torch import nn

    from scalevit.config.tree import Config
    from scalevit.export.average import Measure, Metrics, Soup
    from scalevit.export.base import ModelDescription

EXAMPLES = """\
  scalevit average runs/a runs/b runs/c --output soup.safetensors
  scalevit average runs/a/checkpoints/step-00001000 runs/a/checkpoints/step-00002000 --output soup.safetensors
  scalevit average runs/a runs/b runs/c --output soup.safetensors --greedy --data data/photos/held_out"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="RUN|CHECKPOINT|FILE",
        help="run folders, whose best weights are taken, checkpoints, or weights files; two or more",
    )
    parser.add_argument("--output", required=True, help="the new weights file, NAME.safetensors")
    add_weight_set(parser)
    parser.add_argument(
        "--greedy",
        action="store_true",
        help="begin with the best, and add each next one only if the average's top-1 does not fall (on images that the "
        "final evaluation does not see: give others with --data)",
    )
    parser.add_argument("--data", metavar="SHARDS", help="validation shards (default: those of the first run)")
    parser.add_argument("--config", help="of all of them; default: each one's own")
    parser.add_argument("--no-evaluation", action="store_true", help="do not evaluate")


def run(arguments: argparse.Namespace) -> None:
    """Averages, evaluates and writes; prints a table.

    Raises:
        UserError: a mistake in the arguments, or the sources do not have one structure.
    """
    output = Path(arguments.output)
    if len(arguments.sources) < 2:
        raise UserError(f"{arguments.sources[0]}: an average needs two or more sources")
    if arguments.greedy and arguments.no_evaluation:
        raise UserError("--greedy evaluates every average: leave out --no-evaluation")
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: must end with .safetensors")
    check_new(output)
    overrides = [] if arguments.data is None else [f"data.validation={json.dumps(arguments.data)}"]
    sources = [
        find_source(
            target,
            config=arguments.config,
            overrides=overrides,
            weights=arguments.weights if Path(target).is_dir() else None,
            config_required=False,
        )
        for target in arguments.sources
    ]
    config = None if arguments.no_evaluation else _config(sources, given=bool(arguments.data))
    # Imported late: a mistake in the arguments is reported before torch and timm are loaded, which takes seconds.
    from scalevit.export.average import average
    from scalevit.export.weights_file import write_model

    soup = average(sources, None if config is None else _measure(config), greedy=arguments.greedy)
    write_model(soup.model, soup.description, output)
    if config is not None:
        _print(soup, config)
    used = sum(row.used for row in soup.ingredients)
    print(f"wrote {output}: the average of {used} of {len(sources)} sets of weights")


def _config(sources: list[Source], *, given: bool) -> "Config":
    """Of the evaluation: the first source's that knows its data.

    Args:
        given: the data were named on the command line.

    Raises:
        UserError: none does.
    """
    found = next((source for source in sources if source.has_run), sources[0] if given else None)
    if found is None:
        raise UserError(
            "no source has a run's config beside it: name validation shards with --data, or give --no-evaluation"
        )
    return found.config


def _measure(config: "Config") -> "Measure":
    from scalevit.export.measure import measure_model

    def measure(model: "nn.Module", description: "ModelDescription") -> "Metrics":
        return measure_model(model, description.classes, config).metrics

    return measure


def _print(soup: "Soup", config: "Config") -> None:
    table = narrow_table("weights", "top-1 %", "top-5 %", "used", text=("weights", "used"))
    for row in soup.ingredients:
        table.add_row(row.name, *_accuracies(row.metrics), "yes" if row.used else "no")
    table.add_row("average", *_accuracies(soup.metrics), "")
    print_table(table, f"On {config.data.validation}.")


def _accuracies(metrics: "Metrics") -> list[str]:
    return [f"{metrics[name]:.2f}" for name in ("top1", "top5")]
