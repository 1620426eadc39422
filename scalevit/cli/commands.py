"""Tables of commands: each is a module, which is imported only when it is needed, so that help is quick."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from scalevit.cli.parsing import add_action, run_module
from scalevit.errors import UserError, nearest_hint


@dataclass(frozen=True)
class CommandTable:
    """What may follow a program's name. A command is a module with `add_arguments(parser)`, `run(arguments)` and
    `EXAMPLES`; one whose commands are a table too has it as `COMMANDS`.
    """

    program: str
    """What comes before the command, e.g. "scalevit bench"."""
    kind: str
    """What a command is called, e.g. "benchmark"."""
    commands: Mapping[str, tuple[str, str]]
    """Name -> (module, purpose)."""

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Adds the arguments `name` and `rest`, for `run`, and the list of commands to the description."""
        width = max(map(len, self.commands)) + 2
        metavar = self.kind.upper()
        listed = "\n".join(f"  {name:{width}}{purpose}" for name, (_, purpose) in self.commands.items())
        hint = f"`{self.program} {metavar} --help` lists the arguments of a {self.kind}."
        parser.description = f"{parser.description}\n\n{self.kind}s:\n{listed}\n\n{hint}"
        parser.add_argument("name", metavar=metavar, help=argparse.SUPPRESS)
        rest = parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
        rest.required = False  # or a missing name is reported with this one

    def add_whole(self, parser: argparse.ArgumentParser) -> None:
        """Adds every command with its own arguments, for which it imports all modules."""
        actions = parser.add_subparsers(metavar=self.kind.upper())
        for name in self.commands:
            module, _, purpose = self.find(name)
            command = import_module(module)
            added = add_action(actions, name, purpose, command.EXAMPLES)
            if nested := getattr(command, "COMMANDS", None):
                nested.add_whole(added)
            else:
                command.add_arguments(added)

    def find(self, name: str) -> tuple[str, str, str]:
        """The module, the program's name for its help, and the purpose of a command.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self.commands:
            hint = nearest_hint(name, self.commands)
            names = ", ".join(self.commands)
            raise UserError(f"{self.program} has no {self.kind} {name!r}{hint} ({self.kind}s: {names})")
        module, purpose = self.commands[name]
        return module, f"{self.program} {name}", purpose

    def run(self, name: str, rest: Sequence[str]) -> None:
        """Runs a command.

        Raises:
            UserError: there is none of that name, or what the command raises.
        """
        run_module(*self.find(name), rest)
