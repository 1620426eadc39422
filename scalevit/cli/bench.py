"""`scalevit bench`: measures speed, one benchmark at a time. Each has arguments of its own."""

import argparse

from scalevit.cli.commands import CommandTable

COMMANDS = CommandTable(
    "scalevit bench",
    "benchmark",
    {
        "data": ("scalevit.cli.bench_data", "measure loaders: images per second of one core, ours and others'"),
        # Also runs without the rest of scalevit.
        "kernels": ("scalevit.kernels.bench", "measure the fused MLP; without a GPU show what its kernels need"),
        "train": ("scalevit.cli.bench_train", "measure training steps: each reduction with eager and fused MLPs"),
    },
)
EXAMPLES = """\
  scalevit bench data
  scalevit bench kernels --shapes vit_b --batches 256
  scalevit bench train --config grouped --steps 50"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "scalevit bench [-h] BENCHMARK ..."
    COMMANDS.add_to(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs one benchmark.

    Raises:
        UserError: an unknown benchmark, or what the benchmark raises.
    """
    COMMANDS.run(arguments.name, arguments.rest)
