"""`scalevit bench data`: loaders side by side."""

import argparse
from pathlib import Path

from scalevit.cli.parsing import integer

EXAMPLES = """\
  scalevit bench data
  scalevit bench data --images 2000 --rounds 9 --output results/data_loaders"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=integer(1), default=400, help="generated JPEGs (default: %(default)s)")
    parser.add_argument("--batches", type=integer(1), default=12, help="batches of 32 per round (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=integer(1), default=5, help="rounds; the median is reported (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default="data_loaders", help="path of the .csv, .json and .png, without suffix"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measures, writes the files and prints the rates.

    Raises:
        UserError: a loader fails.
    """
    from scalevit.bench.loaders import compare_loaders

    compare_loaders(arguments.images, arguments.batches, arguments.rounds, arguments.output)
