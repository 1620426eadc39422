"""Arguments of the commands that reduce trained models: how it is done, and on which images."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from scalevit.cli.parsing import integer
from scalevit.config.tree import Config
from scalevit.data.faults import Fault
from scalevit.errors import UserError
from scalevit.export.source import exporter_of, find_source
from scalevit.models.reductions.method import FitMethod, KeptUnits, SharedMlp

_DEFAULTS = FitMethod()
_PRINTED_FAULTS = 5


def add_method(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a `FitMethod`, and the number of calibration images."""
    parser.add_argument(
        "--shared",
        choices=get_args(SharedMlp),
        default=_DEFAULTS.shared,
        help="what blocks that share an MLP start from: the MLP of the first of them, or the mean of theirs with "
        "matched hidden units (default: %(default)s)",
    )
    parser.add_argument(
        "--units",
        choices=get_args(KeptUnits),
        default=_DEFAULTS.units,
        help="hidden units that a narrower MLP keeps: the first, those of the largest weights, or of the largest "
        "activations (default: %(default)s)",
    )
    parser.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        default=_DEFAULTS.refit,
        help="fit fc2 to the outputs of the trained MLPs by least squares (default: %(default)s)",
    )
    parser.add_argument(
        "--ridge",
        type=_positive,
        default=_DEFAULTS.ridge,
        help="weight of the distance to the present fc2 in this fit, relative to the mean square of the hidden units "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--images", type=integer(1), default=512, help="training images for fit and activations (default: %(default)s)"
    )


def trained_config(target: str, config: str | None, overrides: Sequence[str]) -> Config:
    """The config of a run or of a weights file, with its weights as the initial ones.

    Raises:
        UserError: there are no weights or no config, or the target is a checkpoint or an export.
    """
    if (exporter := exporter_of(Path(target))) is not None:
        raise UserError(f"{target}: is an export (--to {exporter.name}): name the run or its weights")
    source = find_source(target, config=config, overrides=overrides)
    if source.part is not None:
        raise UserError(
            f"{target}: is a checkpoint: name a run folder or a weights file (`scalevit checkpoint convert` writes one)"
        )
    return source.config


def method_of(arguments: argparse.Namespace) -> FitMethod:
    """The method that the options name."""
    return FitMethod(arguments.shared, arguments.units, arguments.refit, arguments.ridge)


def warn_of_faults(faults: Sequence[Fault]) -> None:
    """Names bad samples on standard error."""
    for fault in faults[:_PRINTED_FAULTS]:
        print(f"warning: bad sample, replaced by another: {fault}", file=sys.stderr)
    if more := len(faults[_PRINTED_FAULTS:]):
        print(f"warning: ... and {more} more; `scalevit shards verify` lists all", file=sys.stderr)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value
