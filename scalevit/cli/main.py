"""The `scalevit` command: what is not training. Each subcommand imports what it needs, so that help is quick."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from scalevit import __version__
from scalevit.errors import one_line_errors

_BENCHMARKS = {
    "data": "scalevit.bench.loaders",
    "kernels": "scalevit.kernels.bench",
    "train": "scalevit.bench.training",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a user's mistake is one line and exit status 2."""
    from scalevit.cli import checkpoint as checkpoint
    from scalevit.cli import describe as describe
    from scalevit.cli import plan as planning
    from scalevit.cli import shards as shards

    parser = argparse.ArgumentParser(prog="scalevit", description="Train parameter-reduced Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"scalevit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    describe_parser = commands.add_parser("describe", help="parameters and multiply-accumulates of a config's model")
    describe.add_arguments(describe_parser)
    describe_parser.set_defaults(run=describe.run)

    plan = commands.add_parser("plan", help="memory, traffic and speed of a config, per strategy and engine")
    planning.add_arguments(plan)
    plan.set_defaults(run=planning.run)

    shards_parser = commands.add_parser("shards", help="make WebDataset shards")
    shards.add_arguments(shards_parser)
    shards_parser.set_defaults(run=shards.run)

    checkpoint_parser = commands.add_parser("checkpoint", help="look at checkpoints and convert them")
    checkpoint.add_arguments(checkpoint_parser)
    checkpoint_parser.set_defaults(run=checkpoint.run)

    bench = commands.add_parser("bench", help="measure speed; `scalevit bench WHAT --help` tells more", add_help=False)
    bench.add_argument("what", choices=sorted(_BENCHMARKS))
    bench.add_argument("rest", nargs=argparse.REMAINDER)
    bench.set_defaults(run=_bench)

    schema = commands.add_parser("schema", help="print the JSON schema of config files")
    schema.set_defaults(run=_schema)

    arguments = parser.parse_args(argv)
    with one_line_errors(rank=int(os.environ.get("RANK", "0"))):
        arguments.run(arguments)


def _bench(arguments: argparse.Namespace) -> None:
    # Each benchmark has a parser of its own: kernels' also runs alone, without the rest of scalevit.
    sys.exit(import_module(_BENCHMARKS[arguments.what]).main(arguments.rest))


def _schema(arguments: argparse.Namespace) -> None:
    from scalevit.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
