"""The `scalevit` command: finds the module of a command, has it parse the rest, runs it.

A command is a module of this package named after it, with `add_arguments(parser)` and `run(arguments)`, and a line
below. Only the module of the command that was given is imported, so that help is quick.
"""

import argparse
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from scalevit import __version__
from scalevit.cli.parsing import CommandParser, run_module
from scalevit.errors import UserError, nearest_hint, one_line_errors
from scalevit.launchers import reporting_rank

_COMMANDS = {
    "train": "train a model",
    "evaluate": "evaluate weights on the validation images",
    "predict": "print classes and probabilities of images",
    "config": "explain, compare and check settings",
    "describe": "parameters and multiply-accumulates of a model",
    "plan": "estimate memory, traffic and throughput of a run",
    "shards": "write, index and verify WebDataset shards",
    "checkpoint": "inspect and convert checkpoints",
    "bench": "measure the speed of loaders, kernels and training",
    "schema": "print the JSON schema of config files",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. A user's mistake is printed as one line, with exit status 2.

    Args:
        argv: the arguments after the program's name; those of this process by default.
    """
    with one_line_errors(rank=reporting_rank(os.environ)), _quiet_without_reader():
        arguments = _parser().parse_args(argv)
        name = arguments.command
        if name not in _COMMANDS:
            hint = nearest_hint(name, _COMMANDS)
            raise UserError(f"scalevit has no command {name!r}{hint} (commands: {', '.join(_COMMANDS)})")
        run_module(f"scalevit.cli.{name}", f"scalevit {name}", _COMMANDS[name], arguments.rest)


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


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, _COMMANDS)) + 2
    parser = CommandParser(
        prog="scalevit",
        usage="scalevit [-h] [--version] COMMAND ...",
        description="Train parameter-reduced Vision Transformers.\n\ncommands:\n"
        + "\n".join(f"  {name:{width}}{text}" for name, text in _COMMANDS.items()),
        epilog="`scalevit COMMAND --help` lists the arguments of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"scalevit {__version__}")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    rest = parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False  # or a missing name is reported with this one
    return parser
