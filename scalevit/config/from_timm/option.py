"""What the table of timm's options is made of: an option of timm's train.py, and what becomes of it here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text", "integer", "number", "switch", "pairs"]
Fate = Literal["key", "machine", "replaced", "not needed", "not supported yet", "not kept"]

FATES: dict[Fate, str] = {
    "key": "has a key that takes its value",
    "machine": "has a key that belongs to the machine or the run's folder, and is written with `--exact` only",
    "replaced": "has no key that takes its value as it is: it is used, perhaps with other options, for those named",
    "not needed": "has nothing to do here",
    "not supported yet": "has no key yet",
    "not kept": "is left out on purpose",
}


@dataclass(frozen=True)
class Form:
    """How an option is written: its kind, its default in timm, and how many values it takes."""

    kind: Kind
    default: Any = None
    nargs: int | Literal["?", "+", "*"] | None = None
    const: Any = None
    """Its value where it is given without one."""
    choices: tuple[str, ...] = ()
    """All values that timm accepts, where it is known to refuse others."""


def text(default: str | None = None, *choices: str) -> Form:
    return Form("text", default, choices=choices)


def integer(default: int | None = None) -> Form:
    return Form("integer", default)


def number(default: float | None = None) -> Form:
    return Form("number", default)


def numbers(*default: float) -> Form:
    return Form("number", list(default) or None, nargs="+")


def integers(*default: int) -> Form:
    return Form("integer", list(default) or None, nargs="+")


SWITCH = Form("switch", False)
PAIRS = Form("pairs", {}, nargs="*")


@dataclass(frozen=True)
class TimmOption:
    """One option of timm's train.py. The constructors below make one for each `Fate`."""

    flags: tuple[str, ...]
    """As written, e.g. ("-b", "--batch-size"); the positional argument's name without dashes."""
    form: Form
    fate: Fate
    keys: tuple[str, ...] = ()
    """The config keys that it sets, or has a part in."""
    note: str = ""
    """How it is used, or why it is not."""
    convert: Callable[[Any], Any] | None = None
    """From timm's value to the key's; None keeps it."""
    neutral: tuple[Any, ...] = ()
    """Values besides the default that lose nothing where the option has no key."""
    only: tuple[Any, ...] = ()
    """The values that the key has; others are not kept. Empty: all."""
    needs: str = ""
    """The name of an option without which timm does not use this one."""
    paper: bool = False
    """An option of the paper's copy of train.py, and not of timm's."""

    @property
    def flag(self) -> str:
        """Its long form."""
        return next((flag for flag in self.flags if flag.startswith("--")), self.flags[0])

    @property
    def name(self) -> str:
        """Its name in timm's program and in args.yaml, e.g. "batch_size"."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def has_same_name(self) -> bool:
        """Whether its key is called as it is."""
        return self.fate in ("key", "machine") and self.keys[0].rpartition(".")[2] == self.name


def key(flags: str, form: Form, name: str, note: str = "", **more: Any) -> TimmOption:
    """An option with a key.

    Args:
        flags: separated by spaces.
    """
    return TimmOption(tuple(flags.split()), form, "key", (name,), note, **more)


def machine(flags: str, form: Form, name: str, note: str = "", **more: Any) -> TimmOption:
    """An option with a key that is no part of the recipe."""
    return TimmOption(tuple(flags.split()), form, "machine", (name,), note, **more)


def replaced(flags: str, form: Form, names: str, how: str, **more: Any) -> TimmOption:
    """An option that `rules` uses.

    Args:
        names: the keys, separated by spaces.
    """
    return TimmOption(tuple(flags.split()), form, "replaced", tuple(names.split()), how, **more)


def not_needed(flags: str, form: Form, reason: str, **more: Any) -> TimmOption:
    return TimmOption(tuple(flags.split()), form, "not needed", (), reason, **more)


def not_kept(flags: str, form: Form, reason: str, **more: Any) -> TimmOption:
    return TimmOption(tuple(flags.split()), form, "not kept", (), reason, **more)


def not_supported_yet(flags: str, form: Form, reason: str, **more: Any) -> TimmOption:
    """An option whose key may be added: it then becomes a `key` or is `replaced`."""
    return TimmOption(tuple(flags.split()), form, "not supported yet", (), reason, **more)
