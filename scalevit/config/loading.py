"""From a config file and overrides to a valid `Config`, or to one line that says what is wrong.

A file may name another with `extends` (relative to itself); `key.sub=value` overrides from the command line come
last. Later layers win key by key. Where a layer changes the kind of a section (`reduction.strategy`,
`engine.name`), that section starts anew, so that `reduction.strategy=shallow` works on a grouped config.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scalevit.config.explain import explain
from scalevit.config.tree import Config
from scalevit.errors import UserError

# Keys of a file that are not settings: the parent, and the schema that editors complete from.
_META_KEYS = ("extends", "$schema")


def load_config(path: str | os.PathLike[str] | None, overrides: Iterable[str] = ()) -> Config:
    """Reads, merges and validates.

    Args:
        path: a JSON file, or None for the defaults alone.
        overrides: `key.sub=value` strings; a value is JSON, or else a plain string.

    Raises:
        UserError: one line that names the key, the value, what is allowed and the nearest valid name.
    """
    layers = [] if path is None else _read_with_parents(Path(path))
    layers.append(_overrides_layer(overrides))
    kinds = _discriminators()
    # The default kinds are the first layer: `engine.stage=2` alone speaks of the default engine.
    defaults = Config()
    merged: dict[str, Any] = {name: {kind: getattr(getattr(defaults, name), kind)} for name, kind in kinds.items()}
    for layer in layers:
        merged = _merge(merged, layer, kinds)
    return validate(merged)


def validate(settings: dict[str, Any]) -> Config:
    """A `Config` from nested plain settings, types taken strictly (no "3" for 3).

    Raises:
        UserError: as in `load_config`.
    """
    try:
        return Config.model_validate_json(json.dumps(settings), strict=True)
    except ValidationError as error:
        raise UserError(explain(error, settings)) from None


# --- reading ----------------------------------------------------------------------------------------------


def _read_with_parents(path: Path) -> list[dict[str, Any]]:
    """The layers of a file, the furthest parent first."""
    layers: list[dict[str, Any]] = []
    seen: list[Path] = []
    current: Path | None = path
    while current is not None:
        if current.resolve() in seen:
            raise UserError(f"config {path}: `extends` goes in a circle at {current}")
        seen.append(current.resolve())
        layer = _read_json(current)
        parent = layer.get("extends")
        if parent is not None and not isinstance(parent, str):
            raise UserError(f"config {current}: extends = {json.dumps(parent)} must be the path of one file")
        layers.insert(0, {key: value for key, value in layer.items() if key not in _META_KEYS})
        current = None if parent is None else current.parent / parent
    return layers


def _read_json(path: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"config {path}: the key {key!r} stands twice in one section")
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"config {path}: must hold a JSON object, not {type(content).__name__}")
    return content


def _overrides_layer(overrides: Iterable[str]) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        path = key.split(".")
        if not separator or not all(path):
            raise UserError(f"override {override!r}: must read key.sub=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        section = layer
        for depth, part in enumerate(path[:-1]):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"override {override!r}: {'.'.join(path[: depth + 1])} was given a plain value before")
        section[path[-1]] = value
    return layer


def _discriminators() -> dict[str, str]:
    """Sections that come in several kinds, with the key that tells which, e.g. {"engine": "name"}."""
    fields = Config.model_fields.items()
    return {name: str(field.discriminator) for name, field in fields if field.discriminator}


def _merge(base: Any, layer: Any, discriminators: dict[str, str]) -> Any:
    if not (isinstance(base, dict) and isinstance(layer, dict)):
        return layer
    merged = dict(base)
    for key, value in layer.items():
        kind = discriminators.get(key)
        before = base.get(key)
        if (
            kind
            and isinstance(value, dict)
            and isinstance(before, dict)
            and value.get(kind, before[kind]) != before[kind]
        ):
            merged[key] = value
        else:
            merged[key] = _merge(before, value, {}) if key in base else value
    return merged
