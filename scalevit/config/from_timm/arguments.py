"""The arguments of a timm run: from the words of a command, or from the args.yaml of its output folder."""

import argparse
import ast
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from scalevit.config.from_timm.launchers import joined, split_command
from scalevit.config.from_timm.option import Form, TimmOption
from scalevit.config.from_timm.table import OPTIONS
from scalevit.errors import UserError, nearest_hint


def _finite(text: str | float) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


_finite.__name__ = "number"  # as argparse calls what it is not
_TYPES: dict[str, Callable[[Any], Any]] = {"text": str, "integer": int, "number": _finite}


@dataclass(frozen=True)
class TimmArguments:
    """The value of every option, as timm's program has it."""

    values: Mapping[str, Any]
    """By the names of `table.OPTIONS`."""
    given: frozenset[str]
    """Names of those that do not only have timm's default."""
    processes: int | None
    """As the launcher's words say; None if they do not."""
    source: str
    """The command, or the path of the file."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def is_used(self, option: TimmOption) -> bool:
        """Whether timm does anything with the option's value."""
        return not option.needs or bool(self.values[option.needs])

    def shown(self, option: TimmOption) -> str:
        """The option with its value, as written in a command."""
        value = self.values[option.name]
        if option.form.kind == "switch":
            return option.flag
        values = value if isinstance(value, list) else [value]
        if isinstance(value, Mapping):
            values = [f"{key}={each}" for key, each in value.items()]
        return " ".join([option.flag, *(shlex.quote(str(each)) for each in values)])


def read_arguments(source: str) -> TimmArguments:
    """The arguments of a command, or of a YAML file.

    Args:
        source: the words of a command as typed in a shell, or the path of a file that ends in .yaml or .yml.

    Raises:
        UserError: one line: an unknown option with the nearest one, a value that timm would refuse, no such file.
    """
    if len(source.split()) == 1 and Path(source.strip()).suffix in (".yaml", ".yml"):
        return _from_file(Path(source.strip()))
    words, processes = split_command(source)
    given = _parse(words)
    defaults = _read_yaml(Path(given["config"])) if given.get("config") else {}
    values = {**_defaults(), **defaults, **given}
    return TimmArguments(values, frozenset({*defaults, *given}), processes, " ".join(joined(source).split()))


def _from_file(path: Path) -> TimmArguments:
    """The file has the defaults too: what equals them was not given."""
    defaults, values = _defaults(), _read_yaml(path)
    given = frozenset(name for name, value in values.items() if value != defaults[name])
    return TimmArguments({**defaults, **values}, given, None, str(path))


def _defaults() -> dict[str, Any]:
    return {name: option.form.default for name, option in OPTIONS.items()}


# --- a command --------------------------------------------------------------------------------------------


class _TimmParser(argparse.ArgumentParser):
    """Reports a mistake as one line."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if choice := re.search(r"invalid choice: (\S+) \(choose from (.*)\)", message):
            hint = nearest_hint(choice[1].strip("'"), [name.strip("' ") for name in choice[2].split(",")])
        raise UserError(f"timm's command: {' '.join(message.split())}{hint}")


class _Pairs(argparse.Action):
    """`a=1 b=x`: values are Python literals, or else texts."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        pairs = {}
        for pair in values:
            name, separator, value = pair.partition("=")
            if not separator or not name:
                parser.error(f"argument {option_string}: {pair!r} is not NAME=VALUE")
            try:
                pairs[name] = _plain(ast.literal_eval(value))
            except (ValueError, SyntaxError):
                pairs[name] = value
        setattr(namespace, self.dest, pairs)


def _plain(value: Any) -> Any:
    """A literal as JSON has it.

    Raises:
        ValueError: it has no form in JSON.
    """
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _plain(each) for name, each in value.items()}
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(value)


def _parse(words: Sequence[str]) -> dict[str, Any]:
    """The options that are given. As in timm, unique beginnings of names are accepted; of several the last counts."""
    parser = _TimmParser(prog="train.py", add_help=False, argument_default=argparse.SUPPRESS)
    for option in OPTIONS.values():
        _add(parser, option)
    namespace, unknown = parser.parse_known_args(list(words))
    if unknown:
        _refuse(unknown)
    return vars(namespace)


def _add(parser: argparse.ArgumentParser, option: TimmOption) -> None:
    form = option.form
    settings: dict[str, Any] = {}
    if form.kind == "switch":
        settings["action"] = "store_true"
    elif form.kind == "pairs":
        settings |= {"action": _Pairs, "nargs": form.nargs}
    else:
        settings |= {"type": _TYPES[form.kind], "nargs": form.nargs}
        if form.const is not None:
            settings["const"] = form.const
        if form.choices:
            settings["choices"] = form.choices
    if option.flag.startswith("-"):
        parser.add_argument(*option.flags, dest=option.name, default=argparse.SUPPRESS, **settings)
    else:
        parser.add_argument(option.name, **{**settings, "nargs": "?"})


def _refuse(unknown: Sequence[str]) -> NoReturn:
    flags = [flag for option in OPTIONS.values() for flag in option.flags]
    options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if not options:
        raise UserError(f"timm's command: {shlex.join(unknown)} belongs to no option")
    named = ", ".join(f"{option}{_nearest(option, flags)}" for option in options)
    raise UserError(f"timm's command: unknown option {named}")


def _nearest(name: str, names: Sequence[str]) -> str:
    hint = nearest_hint(name, names).removeprefix("; ")
    return f" ({hint})" if hint else ""


# --- a file -----------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> dict[str, Any]:
    """The values of a file by the names of the options, of their kinds.

    Raises:
        UserError: one line.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must have a value for each option's name, as timm's args.yaml")
    unknown = [str(name) for name in content if name not in OPTIONS]
    if unknown:
        named = ", ".join(f"{name}{_nearest(name, list(OPTIONS))}" for name in unknown)
        raise UserError(f"{path}: unknown option {named}")
    return {name: _of_kind(value, OPTIONS[name].form, f"{path}: {name}") for name, value in content.items()}


def _of_kind(value: Any, form: Form, where: str) -> Any:
    """A value of a file, converted as timm converts it: texts as on the command line."""
    if value is None and form.default is None:
        return None
    if value is None and form.kind == "text":
        return ""
    if form.nargs in ("+", 3):
        if not isinstance(value, list):
            raise UserError(f"{where} = {value!r}: must be a list")
        return [_of_kind(each, Form(form.kind), where) for each in value]
    if form.kind == "pairs" and isinstance(value, Mapping):
        return {name: _of_pair(name, each, where) for name, each in value.items()}
    if form.kind == "switch" and isinstance(value, bool):
        return value
    if form.kind == "text" and isinstance(value, str):
        if form.choices and value not in form.choices:
            hint = nearest_hint(value, form.choices)
            raise UserError(f"{where} = {value!r}: must be one of {', '.join(form.choices)}{hint}")
        return value
    if form.kind in ("integer", "number") and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            converted = _TYPES[form.kind](value)
        except ValueError:
            raise UserError(f"{where} = {value!r}: not a valid {form.kind}") from None
        if isinstance(value, str) or converted == value:
            return converted
    raise UserError(f"{where} = {value!r}: not a valid {'value' if form.kind == 'pairs' else form.kind}")


def _of_pair(name: Any, value: Any, where: str) -> Any:
    """A value of a file's `model_kwargs` and the like."""
    if not isinstance(name, str):
        raise UserError(f"{where}: {name!r} is not a name")
    try:
        return _plain(value)
    except ValueError:
        kinds = "a text, a number, true, false, null, or a list or mapping of them"
        raise UserError(f"{where}.{name} = {value}: must be {kinds}") from None
