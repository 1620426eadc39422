"""`scalevit bench train`: training steps side by side, each reduction with eager and with fused MLPs."""

import argparse
from pathlib import Path

from scalevit.cli.parsing import add_config, integer
from scalevit.config.loading import load_config
from scalevit.models.reductions import REDUCTIONS

EXAMPLES = """\
  scalevit bench train --config grouped
  scalevit bench train --config grouped --strategies none grouped --mlps auto --steps 50 --output results"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=[part.kind() for part in REDUCTIONS],
        help="values of reduction.strategy (default: all)",
    )
    parser.add_argument("--mlps", nargs="+", default=["eager", "auto"], help="values of kernels.mlp")
    # Two, for percentiles.
    parser.add_argument("--steps", type=integer(2), default=20, help="measured optimizer steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for bench_train.json and bench_train.csv")


def run(arguments: argparse.Namespace) -> None:
    """Measures every combination and prints the table.

    Raises:
        UserError: as `load_config` and `build_model`.
    """
    configs = [
        load_config(arguments.config, [*arguments.overrides, f"reduction.strategy={strategy}", f"kernels.mlp={mlp}"])
        for strategy in arguments.strategies
        for mlp in arguments.mlps
    ]
    from scalevit.bench.training import compare_training

    compare_training(configs, steps=arguments.steps, output=arguments.output)
