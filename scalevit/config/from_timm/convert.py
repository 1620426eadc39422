"""From the arguments of a timm run to a config, and a line for each option that it does not keep."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from scalevit.config.base import Part, Section
from scalevit.config.from_timm import data_rules, rules
from scalevit.config.from_timm.arguments import TimmArguments
from scalevit.config.from_timm.conversion import Conversion, TimmKnowledge
from scalevit.config.from_timm.option import TimmOption
from scalevit.config.from_timm.table import OPTIONS
from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.errors import UserError

_DIFFERENCES = "what timm does without an option, random draws for one, is in docs/differences.md"
# Written also where they are the defaults: without them a file says little.
_ALWAYS = ("name", "model.name", "data.train", "data.validation", "optimizer.name", "optimizer.lr", "train.epochs")


@dataclass(frozen=True)
class Converted:
    """A config that does what a timm command does, as far as the lines do not say otherwise."""

    config: Config
    settings: dict[str, Any]
    """The content of its file: what differs from the defaults, and a few keys more."""
    lines: tuple[str, ...]
    """What is not kept, and why."""


def convert(
    arguments: TimmArguments,
    *,
    processes: int | None = None,
    exact: bool = False,
    timm: TimmKnowledge,
) -> Converted:
    """Converts the arguments of a timm run.

    Args:
        processes: of the run; None takes what the command says, else 1.
        exact: also write timm's behaviour where scalevit's default differs, and what belongs to the machine and the
            run's folder.
        timm: asked for what the command does not say.

    Raises:
        UserError: the values are no valid config; names the options.
    """
    conversion = Conversion(arguments, exact)
    if processes is None and arguments.processes is None:
        conversion.lines.append("the number of processes is not known: 1 is taken; --gpus gives another")
    processes = processes or arguments.processes or 1
    data_rules.run_name(conversion)  # before the options, of which one may name the run
    _set_keys(conversion)
    facts = timm.model(arguments["model"])
    rules.model(conversion, facts)
    rules.loss(conversion)
    rules.optimizer(conversion, timm)
    rules.schedule(conversion)
    rules.precision(conversion)
    rules.kernels(conversion)
    rules.ema(conversion)
    rules.compilation(conversion)
    rules.task(conversion)
    data_rules.batch(conversion, processes)
    data_rules.augmentation(conversion, processes, facts)
    data_rules.data_set(conversion)
    for key in ("evaluation.every_epochs", "train.checkpoint.every_epochs"):
        conversion.set(key, arguments["val_interval"], "val_interval")
    with _naming_options(conversion):
        config = _with_engine(conversion, _config(conversion), processes, timm)
        timm.check(config, processes)
    conversion.lines.append(_DIFFERENCES)
    return Converted(config, _without_defaults(config), tuple(conversion.lines))


def _set_keys(conversion: Conversion) -> None:
    """Sets the key of each option that has one of its own, and notes the options that are left out."""
    arguments = conversion.arguments
    for option in OPTIONS.values():
        value = arguments[option.name]
        is_given = value != option.form.default
        if not arguments.is_used(option):
            if is_given:
                conversion.left_out(option, f"no effect in timm without {OPTIONS[option.needs].flag}")
        elif option.fate == "key":
            _set_key(conversion, option, value)
        elif option.fate == "machine":
            if is_given:
                conversion.keeps(option, option.keys[0], _converted(option, value))
        elif option.fate != "replaced" and is_given and value not in option.neutral:
            conversion.left_out(option, f"{option.fate}: {option.note}")


def _set_key(conversion: Conversion, option: TimmOption, value: Any) -> None:
    if option.only and value not in option.only:
        conversion.left_out(option, f"not kept: {option.keys[0]} is one of {', '.join(map(str, option.only))}")
        return
    conversion.set(option.keys[0], _converted(option, value), option.name)


def _converted(option: TimmOption, value: Any) -> Any:
    return value if option.convert is None else option.convert(value)


def _config(conversion: Conversion) -> Config:
    return load_config(_nested(conversion.settings))


def _with_engine(conversion: Conversion, config: Config, processes: int, timm: TimmKnowledge) -> Config:
    """The config with an engine that can run its optimizer and clipping, where the default cannot."""
    engine, arguments = timm.engine(config, processes), conversion.arguments
    if engine == config.engine:
        return config
    changed = _without_defaults(engine, "engine.")
    if type(engine) is not type(config.engine):
        changed = {**_selector(engine), **changed}
    for name, value in changed.items():
        conversion.set(f"engine.{name}", value)
    asked = [name for name in ("opt", "clip_mode") if name in arguments.given and arguments.is_used(OPTIONS[name])]
    written = ", ".join(f"engine.{name}={value}" for name, value in changed.items())
    conversion.lines.append(
        f"{' '.join(arguments.shown(OPTIONS[name]) for name in asked)}: scalevit's default engine, "
        f"{config.engine.label}, cannot run this: {written} is written"
    )
    return _config(conversion)


@contextmanager
def _naming_options(conversion: Conversion) -> Iterator[None]:
    """Adds the options to what is wrong with a key.

    Raises:
        UserError: the settings of the block are no valid config.
    """
    try:
        yield
    except UserError as error:
        message = str(error).removeprefix("config: ")
        keys = [key for key in conversion.origins if re.search(rf"(?<![\w.]){re.escape(key)}(?!\w|\.[a-z])", message)]
        named = [
            OPTIONS[name].flag for key in keys for name in conversion.origins[key] if name in conversion.arguments.given
        ]
        origin = f" (from {', '.join(dict.fromkeys(named))})" if named else ""
        raise UserError(f"timm's command gives no valid config: {message}{origin}") from None


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *path, name = key.split(".")
        section = nested
        for part in path:
            section = section.setdefault(part, {})
        section[name] = value
    return nested


def _without_defaults(section: Section, prefix: str = "") -> dict[str, Any]:
    """The settings of a section that are not its defaults, as JSON has them."""
    kept: dict[str, Any] = {}
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, Section):
            inner = _without_defaults(value, f"{key}.")
            if isinstance(value, Part) and type(value) is not type(field.default):
                inner = {**_selector(value), **inner}
            if inner:
                kept[name] = inner
        elif value != field.default or key in _ALWAYS:
            kept[name] = plain[name]
    return kept


def _selector(part: Part) -> dict[str, str]:
    """The key and value that select a Part, e.g. {"strategy": "grouped"}."""
    return {next(iter(type(part).model_fields)): part.kind()}
