"""`scalevit reduce`: reduces trained weights, and writes a file from which the reduced model is trained."""

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from scalevit.cli.fit_arguments import add_method, method_of, trained_config, warn_of_faults
from scalevit.cli.parsing import add_overrides, integer
from scalevit.config.tree import Config
from scalevit.errors import SettingError, UserError
from scalevit.files import check_new
from scalevit.models.reductions import REDUCTIONS
from scalevit.terminal import print_table, progress_text

if TYPE_CHECKING:
    from torch import nn

    from scalevit.training.evaluation import CheckedMetrics

_SUFFIX = ".safetensors"
EXAMPLES = """\
  scalevit reduce runs/baseline --to grouped.safetensors reduction.strategy=grouped
  scalevit reduce runs/baseline --to half.safetensors reduction.strategy=shallow reduction.keep=0.5
  scalevit reduce runs/baseline --to both.safetensors reduction.strategy=grouped reduction.keep=0.5
  scalevit reduce runs/baseline --to pairs.safetensors --choose-pairs 3 reduction.strategy=grouped
  scalevit reduce runs/baseline --to first.safetensors --shared first --no-refit reduction.strategy=grouped

The last line that it prints are the settings with which `scalevit train` continues from the file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="RUN|FILE", help="a run folder, whose best weights are taken, or a weights file"
    )
    add_overrides(parser)
    parser.add_argument("--to", required=True, metavar=f"DEST{_SUFFIX}", help="the weights file to write")
    parser.add_argument("--config", help="of the model; default: the config.json in the run folder or beside the file")
    add_method(parser)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--choose-pairs",
        type=integer(1),
        metavar="N",
        help="share the MLPs of those N pairs of neighbouring blocks that change the outputs least: sets "
        "reduction.groups",
    )
    chosen.add_argument(
        "--choose-blocks",
        type=integer(1),
        metavar="N",
        help="narrow the MLPs of those N blocks that change the outputs least: sets reduction.blocks",
    )


def run(arguments: argparse.Namespace) -> None:
    """Reduces, writes, evaluates before and after, and prints the settings that take the file.

    Raises:
        UserError: a mistake in the arguments, the weights or the data, or a reduction that does not fit.
    """
    config = trained_config(arguments.target, arguments.config, arguments.overrides)
    destination = _destination(arguments.to)
    _check_choice(arguments, config)
    method = method_of(arguments)
    # Imported late: a mistake in the arguments is reported before torch and timm are loaded, which takes seconds.
    from scalevit.analysis.reducing import calibration_samples, chosen_blocks, load_trained, reduce_weights
    from scalevit.export.measure import measure_weights
    from scalevit.models.weights.structure import in_short

    with progress_text("loading the weights") as report:
        trained = load_trained(config)
        samples = cache(lambda: calibration_samples(trained, arguments.images))
        if arguments.choose_pairs or arguments.choose_blocks:
            with _naming_options():
                setting = chosen_blocks(
                    trained,
                    method,
                    samples(),
                    pairs=arguments.choose_pairs,
                    blocks=arguments.choose_blocks,
                    on_block=lambda block: report(f"measuring block {block}"),
                )
            chosen = [f"reduction.{key}={json.dumps(value)}" for key, value in setting.items()]
            if "group_size" in type(config.reduction).model_fields:
                chosen.append("reduction.group_size=null")
            config = trained_config(arguments.target, arguments.config, [*arguments.overrides, *chosen])
        reduced = reduce_weights(
            trained, config.reduction, method, samples, on_use=lambda block: report(f"fitting block {block}")
        )
        written = reduced.write(destination)
        report("evaluating")
        results = [measure_weights(each) for each in (trained.config, written)]
    warn_of_faults(reduced.faults)
    if written.reduction != config.reduction:
        print(
            f"the weights are {in_short(trained.config.reduction)}, which is kept: reduced to "
            f"{in_short(written.reduction)}"
        )
    _print(written.reduction.strategy, [trained.network, reduced.network], results)
    own = [each for each in arguments.overrides if not each.startswith("reduction.")]
    start = trained_config(arguments.target, arguments.config, own)
    print(f"wrote {destination}; to train from it:\n  {shlex.join(overrides_of(start, written))}")


def _check_choice(arguments: argparse.Namespace, config: Config) -> None:
    strategy = config.reduction.strategy
    if not config.reduction.changes_model:
        able = [part.kind() for part in REDUCTIONS if part.changes_model]
        choice = f"{', '.join(able[:-1])} or {able[-1]}"
        raise UserError(f'config: reduction.strategy = "{strategy}": give reduction.strategy={choice}')
    for given, option, setting in (
        (arguments.choose_pairs, "--choose-pairs", "groups"),
        (arguments.choose_blocks, "--choose-blocks", "blocks"),
    ):
        if given and setting not in type(config.reduction).model_fields:
            able = [part.kind() for part in REDUCTIONS if setting in part.model_fields]
            raise UserError(
                f"{option} sets reduction.{setting}, which {strategy!r} does not have: give "
                f"reduction.strategy={' or '.join(able)}"
            )
        own = {each.partition("=")[0] for each in arguments.overrides if not each.endswith("=null")}
        for other in (setting, "group_size") if given else ():
            key = f"reduction.{other}"
            if key in own or (other == setting and getattr(config.reduction, setting) is not None):
                raise UserError(f"{option} sets reduction.{setting}, and {key} is given too: leave out one of the two")


@contextmanager
def _naming_options() -> Iterator[None]:
    """Names the option that filled an argument of `chosen_blocks`."""
    try:
        yield
    except SettingError as error:
        raise UserError(f"--choose-{error.argument} {error.value}: {error.reason}") from error


def _destination(given: str) -> Path:
    path = Path(given)
    if path.suffix != _SUFFIX:
        raise UserError(f"--to {given}: must end with {_SUFFIX}")
    check_new(path)
    return path


def _print(strategy: str, networks: "Sequence[nn.Module]", results: "Sequence[CheckedMetrics | None]") -> None:
    table = Table()
    for heading in ("", "trained", strategy):
        table.add_column(heading, justify="right" if heading else "left")
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    table.add_row("parameters", *(f"{count:,}" for count in counts))
    table.add_row("share", "100 %", f"{100 * counts[1] / counts[0]:.1f} %")
    found = [result.metrics for result in results if result is not None]
    if len(found) == len(results):
        for name, unit in (("top1", " %"), ("top5", " %"), ("loss", "")):
            table.add_row(name, *(f"{metrics[name]:.{2 if unit else 4}f}{unit}" for metrics in found))
    print_table(table, *([] if found else ["Not evaluated: there are no validation shards."]))


def overrides_of(start: Config, reduced: Config) -> list[str]:
    """Overrides of the trained run's config that build the reduced model from its file."""
    # Of the same kind as the config's, those that differ from it; else those that differ from the defaults.
    same_kind = type(start.reduction) is type(reduced.reduction)
    before = start.reduction.model_dump(mode="json") if same_kind else {}
    given = reduced.reduction.model_dump(mode="json", exclude_defaults=not same_kind)
    changed = {key: value for key, value in given.items() if key != "strategy" and (key, value) not in before.items()}
    values: dict[str, Any] = {
        "model.initial_weights": reduced.model.initial_weights,
        "reduction.strategy": reduced.reduction.strategy,
    }
    values |= {f"reduction.{key}": value for key, value in changed.items()}
    if reduced.model.kwargs != start.model.kwargs:
        values["model.kwargs"] = reduced.model.kwargs
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
