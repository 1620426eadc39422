"""`scalevit bench data`: loaders side by side."""

import argparse
from pathlib import Path

from scalevit.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=400, help="generated JPEGs (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=12, help="batches of 32 per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median is reported (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default="data_loaders", help="path of the .csv, .json and .png, without suffix"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measures, writes the files and prints the rates.

    Raises:
        UserError: a loader fails, or a number is below 1.
    """
    for name in ("images", "batches", "rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} = {getattr(arguments, name)}: must be at least 1")
    from scalevit.bench.loaders import compare_loaders

    compare_loaders(arguments.images, arguments.batches, arguments.rounds, arguments.output)
