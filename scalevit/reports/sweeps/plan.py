"""From a config, varied settings and seeds to the runs of a sweep, each with its name and its whole, checked config."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from scalevit.config.keys import all_keys, find_key, is_free_form
from scalevit.config.loading import LAYER, load_config
from scalevit.config.tree import Config
from scalevit.errors import UserError

_OF_THE_SWEEP = {"seed": "use --seeds", "name": "runs are named by the sweep", "output_dir": "give it as a setting"}
_LONGEST_NAME = 100
_MOST_SEEDS = 1000
_PLAIN_STRING = re.compile(r"[A-Za-z_][A-Za-z0-9._/-]*")


@dataclass(frozen=True)
class Variation:
    """A setting and its values in a sweep."""

    key: str
    """Whole, e.g. "reduction.strategy"; any name where every value is a config."""
    label: str
    """As the user gave it, e.g. "reduction"."""
    values: tuple[str, ...]
    """Each as in an override, after the "="; or "@CONFIG"."""

    @property
    def has_layers(self) -> bool:
        """Whether a value is a config, which may change any setting."""
        return any(value.startswith(LAYER) for value in self.values)

    def override(self, value: str) -> str:
        """For `load_config`."""
        return value if value.startswith(LAYER) else f"{self.key}={value}"

    def part_of_name(self, value: str) -> str:
        """What a run's name says of a value: "grouped", "lr0.001"."""
        if value.startswith(LAYER) or _is_word(value):
            return _as_name(value.removeprefix(LAYER))
        return _as_name(f"{_shortest(self.key)}{'' if value[0].isdigit() else '-'}{value}")


def _is_word(value: str) -> bool:
    """Whether it is a plain string, not another JSON value."""
    return bool(_PLAIN_STRING.fullmatch(value)) and value not in ("true", "false", "null")


def _as_name(text: str) -> str:
    """Text in the characters of a run's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_.") or "empty"


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    values: dict[str, str]
    """By label of what is varied."""
    config: Config

    @property
    def combination(self) -> str:
        """Its values as text: "reduction=grouped, lr=0.001"; "all" where only the seed differs."""
        return ", ".join(f"{label}={value}" for label, value in self.values.items()) or "all"

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir) / self.config.name


@dataclass(frozen=True)
class SweepPlan:
    """A sweep before it runs."""

    config: str
    """A file or preset."""
    folder: Path
    variations: tuple[Variation, ...]
    runs: tuple[SweepRun, ...] = field(repr=False)

    @property
    def combinations(self) -> list[str]:
        return list(dict.fromkeys(run.combination for run in self.runs))


def make_plan(
    config: str,
    overrides: Sequence[str] = (),
    variations: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    *,
    name: str | None = None,
) -> SweepPlan:
    """Checks every combination. Seeds change fastest only within one combination.

    Args:
        config: a file or preset.
        overrides: `key.sub=value` and `@CONFIG` strings for all runs.
        variations: `KEY=V1,V2,...` strings.
        seeds: None for the config's own.
        name: of the sweep's folder in `output_dir`; by default the config's with "-sweep".

    Raises:
        UserError: a wrong key or value, in one line that names the combination.
    """
    varied = tuple(map(parse_variation, variations))
    keys = [variation.key for variation in varied]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--vary {key}: is given twice; list all values in one: KEY=V1,V2")
    runs: list[SweepRun] = []
    folder: Path | None = None
    for values in product(*(variation.values for variation in varied)):
        chosen = list(zip(varied, values, strict=True))
        own = [*overrides, *(variation.override(value) for variation, value in chosen)]
        of_combination = _load(config, own, chosen)
        folder = folder or Path(of_combination.output_dir) / _sweep_name(name or f"{of_combination.name}-sweep")
        parts = [variation.part_of_name(value) for variation, value in chosen]
        for seed in [of_combination.seed] if seeds is None else seeds:
            run_name = _run_name([*parts, f"seed{seed}"])
            place = {"seed": seed, "name": run_name, "output_dir": str(folder)}
            runs.append(
                SweepRun(
                    name=run_name,
                    values={variation.label: value for variation, value in chosen},
                    config=of_combination.model_copy(update=place),
                )
            )
    _check_names(runs)
    assert folder is not None, "a product has at least one combination"
    return SweepPlan(config, folder, varied, tuple(runs))


def _load(config: str, overrides: Sequence[str], chosen: Sequence[tuple[Variation, str]]) -> Config:
    try:
        return load_config(config, overrides)
    except UserError as error:
        if not chosen:
            raise
        combination = ", ".join(f"{variation.label}={value}" for variation, value in chosen)
        raise UserError(f"sweep with {combination}: {error}") from None


def _sweep_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(
            f"--name {name!r}: must have letters, digits, '.', '_' and '-' only, and begin with one of the first"
        )
    return name


def _run_name(parts: Sequence[str]) -> str:
    name = "-".join(parts)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}-{parts[-1]}"


def _check_names(runs: Sequence[SweepRun]) -> None:
    first: dict[str, SweepRun] = {}
    for run in runs:
        if run.name in first:
            same = f"{first[run.name].combination} and {run.combination}"
            raise UserError(f"sweep: two runs would be called {run.name} ({same}): give each value and seed once")
        first[run.name] = run


# --- keys -------------------------------------------------------------------------------------------------


def parse_variation(text: str) -> Variation:
    """`KEY=V1,V2,...`: the key whole, of a section that has several types, or its last part where only one key has it.

    Raises:
        UserError: another form, or no such key.
    """
    label, separator, listed = text.partition("=")
    values = tuple(map(_canonical, _split(listed)))
    if not separator or not label or "" in values:
        raise UserError(f"--vary {text!r}: must have the form KEY=V1,V2,...")
    repeated = next((value for value in values if values.count(value) > 1), None)
    if repeated is not None:
        raise UserError(f"--vary {label}: the value {repeated} is given twice")
    if all(value.startswith(LAYER) for value in values):
        return Variation(label, label, values)
    return Variation(_whole_key(label), label, values)


def _whole_key(label: str) -> str:
    if label in _OF_THE_SWEEP:
        raise UserError(f"--vary {label}: cannot be varied; {_OF_THE_SWEEP[label]}")
    keys = all_keys()
    selectors = {key.only_with.partition(" = ")[0] for key in keys}
    names = list(dict.fromkeys(key.name for key in keys if not key.is_section or is_free_form(key.name)))
    by_selector = next((selector for selector in sorted(selectors) if selector.rpartition(".")[0] == label), None)
    if label in names or any(is_free_form(label[:end]) for end in _dots(label)):
        return label
    if by_selector:
        return by_selector
    if any(key.name == label for key in keys):
        raise UserError(f"--vary {label}: is a section; name one of its settings, e.g. {_example(names, label)}")
    ending = [name for name in names if name.rpartition(".")[2] == label]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise UserError(f"--vary {label}: is not one key; name one of {', '.join(ending)}")
    nearest = find_key(label)
    hint = f"; nearest: {nearest}" if nearest else ""
    raise UserError(f"--vary {label}: is not a setting{hint}; `scalevit config show` lists all")


def _example(names: Sequence[str], section: str) -> str:
    return next(name for name in names if name.startswith(f"{section}."))


def _dots(text: str) -> Iterator[int]:
    return (match.start() for match in re.finditer(r"\.", text))


def _shortest(key: str) -> str:
    """The shortest ending of a key that no other key has: "lr", "ema.enabled"."""
    names = {known.name for known in all_keys()} - {key}
    parts = key.split(".")
    for count in range(1, len(parts)):
        ending = ".".join(parts[-count:])
        if not any(name == ending or name.endswith(f".{ending}") for name in names):
            return ending
    return key


# --- values -----------------------------------------------------------------------------------------------


def _split(listed: str) -> list[str]:
    """At the commas that are not inside brackets or quotes."""
    values, depth, quoted = [""], 0, False
    for before, character in zip(f" {listed}", listed, strict=False):
        if character == '"' and before != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0 and not quoted:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def _canonical(text: str) -> str:
    """One text for one value: 0.001 for 1e-3."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, str) and _PLAIN_STRING.fullmatch(value) else json.dumps(value)


def parse_seeds(text: str) -> list[int]:
    """`5` for the seeds 1 to 5, `3,7` for these two, `7,` for this one.

    Raises:
        UserError: another form.
    """
    parts = text.removesuffix(",").split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,18}\s*", part) for part in parts):
        raise UserError(f"--seeds {text!r}: must be a number of seeds, or a list of seeds such as 1,2,3")
    numbers = list(map(int, parts))
    if "," not in text:
        if not 1 <= numbers[0] <= _MOST_SEEDS:
            raise UserError(f"--seeds {text}: must be 1 to {_MOST_SEEDS} seeds; a single seed has a comma: {text},")
        return list(range(1, numbers[0] + 1))
    for seed in numbers:
        if numbers.count(seed) > 1:
            raise UserError(f"--seeds {text}: the seed {seed} is given twice")
    return numbers
