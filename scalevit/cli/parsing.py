"""What the commands share: arguments of a config, integers in a range, help with examples, and running a module."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from scalevit.errors import UserError, nearest_hint
from scalevit.runs.summary import EMA, WEIGHTS


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds `--config` and the overrides, for `scalevit.config.loading.load_config`."""
    parser.add_argument(
        "--config",
        required=required,
        help="a JSON file, a run folder, or a preset by name: quickstart, baseline, grouped, ...",
    )
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds `key.sub=value` and `@CONFIG` arguments."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings that override the config's, e.g. train.epochs=90; @CONFIG adds those of a further config",
    )


def add_weight_set(parser: argparse.ArgumentParser) -> None:
    """Adds `--weights`."""
    parser.add_argument(
        "--weights",
        choices=[EMA, WEIGHTS],
        help="of a run or a checkpoint: the averaged or the plain ones (default: the better of a run, and the averaged "
        "ones of a checkpoint where it has them)",
    )


def integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """The `type` of an argument that is an integer in a range.

    Args:
        lowest, highest: the range, both included; None has no upper end.
    """

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {lowest}")
        if highest is not None and value > highest:
            raise argparse.ArgumentTypeError(f"{value}: must be at most {highest}")
        return value

    return parse


def fraction(text: str) -> float:
    """The `type` of an argument that is a number between 0 and 1, both excluded."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value:g}: must be between 0 and 1")
    return value


def run_module(module: str, program: str, purpose: str, argv: Sequence[str]) -> None:
    """Parses the arguments of a module with `add_arguments`, `run` and `EXAMPLES`, and runs it.

    Args:
        program: shown in its help, e.g. "scalevit train".
        purpose: what it does, in a few words.
    """
    command, arguments = parse_module(module, program, purpose, argv)
    if status := command.run(arguments):
        sys.exit(status)


def parse_module(module: str, program: str, purpose: str, argv: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The module and its arguments, for `run_module`."""
    command = import_module(module)
    parser = CommandParser(prog=program, **help_texts(purpose, command.EXAMPLES))
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    command.add_arguments(parser)
    return command, parser.parse_args(argv)


def add_action(actions: Any, name: str, purpose: str, examples: str, details: str = "") -> argparse.ArgumentParser:
    """Adds an action to what `add_subparsers` returned, and returns its parser.

    Args:
        purpose: what it does, in a few words that begin with a verb.
        examples: as in `help_texts`.
        details: more about it, in lines.
    """
    parser: argparse.ArgumentParser = actions.add_parser(name, help=purpose, **help_texts(purpose, examples, details))
    return parser


def help_texts(purpose: str, examples: str, details: str = "") -> dict[str, Any]:
    """What a parser needs to begin its help with a sentence and to end it with examples.

    Args:
        purpose: in a few words that begin with a verb.
        examples: indented lines, each a command and perhaps a comment. Other text may follow after an empty line.
        details: what the help says after the sentence, in lines.
    """
    sentence = f"{purpose[0].upper()}{purpose[1:]}."
    return {
        "description": f"{sentence}\n\n{details}" if details else sentence,
        "epilog": f"examples:\n{examples}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


class CommandParser(argparse.ArgumentParser):
    """Reports a mistake as a `UserError`, with the nearest valid name where there is one.

    Parses overrides also between options (intermixed), where argparse supports it: not beside actions.
    """

    _intermixed = True

    def add_subparsers(self, **settings: Any) -> Any:
        self._intermixed = False
        return super().add_subparsers(**settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        if settings.get("nargs") == argparse.REMAINDER:
            self._intermixed = False
        return super().add_argument(*names, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self._intermixed:
            return super().parse_known_args(args, namespace)
        self._intermixed = False  # argparse parses intermixed arguments by calls of this method
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = True

    def error(self, message: str) -> NoReturn:
        hint = ""
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            # One of the same name is that of another action.
            names = [name for name in self._option_names() if name != unknown[1]]
            hint = nearest_hint(unknown[1], names) or self._setting_hint(unknown[1])
        elif choice := re.search(r"invalid choice: (\S+) \(choose from (.*)\)", message):
            hint = nearest_hint(choice[1].strip("'"), [name.strip("' ") for name in choice[2].split(",")])
        raise UserError(f"{self.prog}: {' '.join(message.split())}{hint}; see {self.prog} --help")

    def _setting_hint(self, option: str) -> str:
        """For `--epochs 3`, where settings are given as `train.epochs=3`."""
        if not self._takes_settings():
            return ""
        from scalevit.config.keys import find_key  # takes 0.2 s

        found = find_key(option.lstrip("-").replace("-", "_"))
        return f"; settings are given as {found}=VALUE" if found else ""

    def _takes_settings(self) -> bool:
        """Or one of its actions, because it reports their unknown options too."""
        nested = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return any(action.dest == "overrides" for action in self._actions) or any(
            parser._takes_settings() for choices in nested for parser in choices.values()
        )

    def _option_names(self) -> list[str]:
        """Of this parser and, because it reports their unknown options too, of its actions."""
        names = [name for action in self._actions if action.help != argparse.SUPPRESS for name in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names += [name for parser in action.choices.values() for name in parser._option_names()]
        return names
