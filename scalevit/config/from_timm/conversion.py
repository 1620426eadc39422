"""What a conversion collects: settings by key, and a line for whatever the settings do not have."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from scalevit.config.from_timm.arguments import TimmArguments
from scalevit.config.from_timm.option import TimmOption
from scalevit.config.from_timm.table import OPTIONS
from scalevit.config.tree import Config
from scalevit.engines.settings import EngineSettings


@dataclass(frozen=True)
class ModelFacts:
    """What timm takes from a model where a command says nothing."""

    image_size: int
    num_classes: int
    """0: it has no classifier of its own."""
    interpolation: str
    """Of evaluations."""
    crop_mode: str
    """Of evaluations; timm's trainer does not use it."""
    drop_path: float
    """The rate of its last block."""


class TimmKnowledge(Protocol):
    """What is asked of timm itself, where a command does not say it."""

    def model(self, name: str) -> ModelFacts: ...

    def optimizer_arguments(self, name: str) -> frozenset[str]:
        """Which of eps, betas and momentum an optimizer has; timm ignores the others."""

    def engine(self, config: Config, processes: int) -> EngineSettings:
        """The config's engine, or one that can run its optimizer and clipping where that one cannot."""

    def check(self, config: Config, processes: int) -> None:
        """Raises a `UserError` with the config key for names and arguments that timm does not take."""


@dataclass
class Conversion:
    """From the arguments of a timm run to settings."""

    arguments: TimmArguments
    exact: bool
    """Whether timm's behaviour is taken where scalevit's default differs, and what belongs to machine and folders."""
    settings: dict[str, Any] = field(default_factory=dict)
    """By whole key."""
    origins: dict[str, list[str]] = field(default_factory=dict)
    """Key -> the options that it comes from."""
    lines: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, *options: str) -> None:
        """Sets a key.

        Args:
            options: the names of the options that it comes from, for messages.
        """
        self.settings[key] = value
        self.origins.setdefault(key, []).extend(options)

    def left_out(self, option: TimmOption, reason: str) -> None:
        """Notes an option that the settings do not have."""
        self.lines.append(f"{self.arguments.shown(option)}: {reason}")

    def has_no_effect(self, names: Iterable[str], condition: str) -> None:
        """Notes those of the options that are not at their defaults: timm does not use them either.

        Args:
            condition: when that is, e.g. "beside --lr".
        """
        for option in (OPTIONS[name] for name in names):
            if self.arguments[option.name] != option.form.default:
                self.left_out(option, f"no effect in timm {condition}")

    def differs(self, key: str, value: Any, matter: str) -> None:
        """Where no option of timm's says what its program does, and scalevit's default is something else.

        Args:
            key, value: the setting that does as timm.
            matter: what timm does.
        """
        if self.exact:
            self.set(key, value)
        else:
            self.lines.append(f"timm {matter}: {key}={_shown(value)} does so too")

    def keeps(self, option: TimmOption, key: str, value: Any) -> None:
        """A setting that belongs to the machine or the run's folder."""
        if self.exact:
            self.set(key, value, option.name)
        else:
            self.left_out(option, f"belongs to the machine or the run's folder: {key}={_shown(value)} keeps it")


def _shown(value: Any) -> str:
    """A value as in an override on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
