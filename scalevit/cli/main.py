"""The `scalevit` command: finds the module of a command, has it parse the rest, runs it.

A command is a module of this package named after it, as `CommandTable` describes, and a line below.
"""

import argparse
import io
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from scalevit import __version__
from scalevit.cli.commands import CommandTable
from scalevit.cli.parsing import CommandParser, help_texts
from scalevit.errors import one_line_errors
from scalevit.launchers import reporting_rank

COMMANDS = CommandTable(
    "scalevit",
    "command",
    {
        name: (f"scalevit.cli.{name.replace('-', '_')}", purpose)
        for name, purpose in {
            "train": "train a model",
            "sweep": "train with several settings and seeds, one run after the other or in parallel",
            "runs": "list runs with their state, progress and best result",
            "evaluate": "evaluate weights on the validation images",
            "predict": "print classes and probabilities of images",
            "export": "write a trained model for timm, model hubs, torch or ONNX",
            "average": "average the weights of several checkpoints or runs",
            "reduce": "reduce trained weights for fine-tuning",
            "analyze": "measure which blocks of trained weights can share or lose an MLP",
            "config": "explain, compare and check settings",
            "from-timm": "turn a command of timm's train.py into a config",
            "describe": "count the parameters and multiply-accumulates of a model",
            "report": "make tables, tests, figures and a page from finished runs",
            "plan": "estimate memory, traffic and throughput of a run",
            "shards": "write, split, show, index and verify WebDataset shards",
            "checkpoint": "inspect and convert checkpoints",
            "bench": "measure the speed of loaders, kernels and training",
            "schema": "print the JSON schema of config files",
            "completion": "print the script with which a shell completes commands, options and settings",
        }.items()
    },
)
_EXAMPLES = """\
  scalevit train --config quickstart
  scalevit shards write --source photos/train --destination data/train
  scalevit plan --config grouped --gpus 8"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. A user's mistake is printed as one line, with exit status 2.

    Args:
        argv: the arguments after the program's name; those of this process by default.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text
    with one_line_errors(rank=reporting_rank(os.environ)), _quiet_without_reader():
        parser = top_parser()
        COMMANDS.add_to(parser)
        arguments = parser.parse_args(argv)
        COMMANDS.run(arguments.name, arguments.rest)


@contextmanager
def _quiet_without_reader() -> Iterator[None]:
    """Ends the process with status 1 and without a traceback where the reader of the output, e.g. `head`, has ended."""
    try:
        yield
        print(end="", flush=True)
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not output.poll(0):  # another pipe is broken
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it again when it ends
        sys.exit(1)


def top_parser() -> CommandParser:
    """The parser of `scalevit` itself, without commands."""
    parser = CommandParser(
        prog="scalevit",
        usage="scalevit [-h] [--version] COMMAND ...",
        **help_texts("train parameter-reduced Vision Transformers", _EXAMPLES),
    )
    parser.add_argument("--version", action="version", version=f"scalevit {__version__}")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser
