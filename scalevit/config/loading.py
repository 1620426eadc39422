"""From a config file and overrides to a valid `Config`, or to one line that says what is wrong.

A config is a path or the name of a preset (`configs/`, in the installed package `scalevit/presets`). A file may name
another with `extends`; the command line adds further files (`@recipes/digits`), then `key.sub=value` overrides. Later
layers override earlier ones key by key. Where a layer changes the type of a section (`reduction.strategy`,
`engine.name`), that section is replaced, so that `reduction.strategy=shallow` works on a grouped config.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scalevit.config.explain import explain, key_path
from scalevit.config.keys import is_free_form
from scalevit.config.renamed import refuse_renamed
from scalevit.config.tree import Config
from scalevit.errors import UserError, nearest_hint

PRESETS = Path(__file__).parents[1] / "presets"
LAYER = "@"
"""Before the name of a config among the overrides."""

# Keys of a file that are not settings: its parent, a note for readers, and the schema that editors complete from.
_META_KEYS = ("extends", "about", "$schema")


def load_config(config: str | os.PathLike[str] | Mapping[str, Any] | None, overrides: Iterable[str] = ()) -> Config:
    """Reads, merges and validates.

    Args:
        config: a JSON file or the name of a preset, its content, or None for the defaults only.
        overrides: `key.sub=value` strings; a value is JSON, or else a plain string. An object replaces one of the
            user's own keys (`model.kwargs={}`), and is merged into a section. `@CONFIG` lays a further file or preset
            over `config`; several are applied in their order, and all before the settings.

    Raises:
        UserError: one line that names the key, the value, what is allowed and the nearest valid name.
    """
    if config is None:
        layers = []
    else:
        layers = [dict(config)] if isinstance(config, Mapping) else _read_with_parents(find_config(config))
    overrides = list(overrides)
    for name in (text.removeprefix(LAYER) for text in overrides if is_overlay(text)):
        layers += _read_with_parents(_find_overlay(name))
    given, numbers = _overrides_layer(text for text in overrides if not is_overlay(text))
    types = _discriminators()
    # The default types are the first layer: `engine.stage=2` without `engine.name` applies to the default engine.
    defaults = Config()
    merged: dict[str, Any] = {name: {key: getattr(getattr(defaults, name), key)} for name, key in types.items()}
    for layer in [*layers, given]:
        merged = _merge(merged, layer, types)
    _replace_whole(merged, given)
    _keep_text_for_strings(merged, numbers)
    return validate(merged)


def validate(settings: dict[str, Any]) -> Config:
    """A `Config` from nested plain settings, types taken strictly (no "3" for 3).

    Raises:
        UserError: as in `load_config`.
    """
    refuse_renamed(settings)
    try:
        return _parse(settings)
    except ValidationError as error:
        raise UserError(explain(error, settings)) from None


def _parse(settings: dict[str, Any]) -> Config:
    return Config.model_validate_json(json.dumps(settings), strict=True)


def is_overlay(text: str) -> bool:
    """Whether a word of the command line names a further config, `@CONFIG`."""
    return text.startswith(LAYER)


def is_override(text: str) -> bool:
    """Whether a word of the command line changes a config: `@CONFIG` or `key.sub=value`."""
    return is_overlay(text) or "=" in text


# --- finding ----------------------------------------------------------------------------------------------


def preset_names() -> list[str]:
    """The names that `find_config` accepts, e.g. "quickstart"; in a subfolder "folder/name"."""
    files = (path.relative_to(PRESETS).with_suffix("") for path in PRESETS.rglob("*.json"))
    return sorted(name for name in map(Path.as_posix, files) if name != "schema")


def find_config(config: str | os.PathLike[str], folder: Path = Path()) -> Path:
    """The file of a config: a path where a file exists, a preset of that name, or that of a run folder.

    Args:
        folder: what a relative path is relative to.

    Raises:
        UserError: neither exists; names the nearest preset.
    """
    path, names = folder / config, preset_names()
    name = Path(config).as_posix().removesuffix(".json")
    if path.is_file():
        return path
    if name in names:
        return PRESETS / f"{name}.json"
    if (path / "config.json").is_file():
        return path / "config.json"
    if path.exists():
        raise UserError(f"config {path}: is a folder without a config.json")
    if is_overlay(name):
        reason = f"{LAYER} lays a config over another, and follows it: CONFIG {name}; or leave {LAYER} out"
        raise UserError(f"config {name}: {reason}")
    hint = nearest_hint(name, names) or nearest_hint(Path(name).name, names)
    raise UserError(f"config {os.fspath(config)}: no such file or preset{hint} (presets: {', '.join(names)})")


# --- reading ----------------------------------------------------------------------------------------------


def _read_with_parents(path: Path) -> list[dict[str, Any]]:
    """The layers of a file, the furthest parent first."""
    layers: list[dict[str, Any]] = []
    seen: list[Path] = []
    current: Path | None = path
    while current is not None:
        if current.resolve() in seen:
            raise UserError(f"config {path}: `extends` is circular at {current}")
        seen.append(current.resolve())
        layer = _read_json(current)
        parent = layer.get("extends")
        if parent is not None and not isinstance(parent, str):
            raise UserError(f"config {current}: extends = {json.dumps(parent)}: must be one file or preset")
        if not isinstance(layer.get("about", {}), dict):
            raise UserError(f"config {current}: about = {json.dumps(layer['about'])}: must be an object of texts")
        layers.insert(0, {key: value for key, value in layer.items() if key not in _META_KEYS})
        current = None if parent is None else _find_parent(parent, current)
    return layers


def _find_overlay(name: str) -> Path:
    if not name:
        raise UserError(f"override {LAYER!r}: must name a config, e.g. @recipes/digits")
    return find_config(name)


def _find_parent(parent: str, child: Path) -> Path:
    try:
        return find_config(parent, child.parent)
    except UserError as error:
        raise UserError(f"config {child}: extends: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"config {path}: the key {key!r} appears twice in one section")
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"config {path}: must contain a JSON object, not {type(content).__name__}")
    return content


def _overrides_layer(overrides: Iterable[str]) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The overrides as nested settings, and the text of those that were read as numbers, by key path."""
    layer: dict[str, Any] = {}
    numbers: dict[tuple[str, ...], str] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        path = key.split(".")
        if not separator or not all(path):
            raise UserError(f"override {override!r}: must have the form key.sub=value")
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            value = text
        section = layer
        for depth, part in enumerate(path[:-1]):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"override {override!r}: {'.'.join(path[: depth + 1])} was set to a plain value before")
        section[path[-1]] = _Whole(value) if isinstance(value, dict) and is_free_form(key) else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers[tuple(path)] = text
    return layer, numbers


class _Whole(dict[str, Any]):
    """An object that an override gives for a key which holds the user's own keys: `model.kwargs={}`.

    It replaces the config's. In files such objects are merged, and `model.kwargs.depth=4` changes one of their keys.
    """


def _replace_whole(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """Puts what overrides give whole in place of what was merged, in place."""
    for name, value in given.items():
        if isinstance(value, _Whole):
            settings[name] = dict(value)
        elif isinstance(value, dict) and isinstance(settings.get(name), dict):
            _replace_whole(settings[name], value)


def _keep_text_for_strings(settings: dict[str, Any], numbers: dict[tuple[str, ...], str]) -> None:
    """Puts back the text of overrides that look like numbers where a string is expected: `name=2024`, in place."""
    if not numbers:
        return
    try:
        _parse(settings)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            path = tuple(key_path(problem["loc"], settings))
            if problem["type"] == "string_type" and path in numbers:
                section = settings
                for part in path[:-1]:
                    section = section[part]
                section[path[-1]] = numbers[path]


def _discriminators() -> dict[str, str]:
    """Sections of several types, with the key that selects the type, e.g. {"engine": "name"}."""
    fields = Config.model_fields.items()
    return {name: str(field.discriminator) for name, field in fields if field.discriminator}


def _merge(base: Any, layer: Any, discriminators: dict[str, str]) -> Any:
    if not (isinstance(base, dict) and isinstance(layer, dict)):
        return layer
    merged = dict(base)
    for key, value in layer.items():
        selector = discriminators.get(key)
        before = base.get(key)
        if (
            selector
            and isinstance(value, dict)
            and isinstance(before, dict)
            and value.get(selector, before[selector]) != before[selector]
        ):
            merged[key] = value
        else:
            merged[key] = _merge(before, value, {}) if key in base else value
    return merged
