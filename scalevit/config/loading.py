"""From a config file and overrides to a valid `Config`, or to one line that says what is wrong.

A file may name another with `extends` (relative to itself); `key.sub=value` overrides from the command line come
last. Later layers win key by key. Where a layer changes the kind of a section (`reduction.strategy`,
`engine.name`), that section starts anew, so that `reduction.strategy=shallow` works on a grouped config.
"""

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

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
        raise UserError(_explain(error, settings)) from None


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, as in `configs/schema.json`."""
    schema = Config.model_json_schema()
    schema["properties"] = {
        "$schema": {"type": "string", "description": "This schema, for editors."},
        "extends": {"type": "string", "description": "Another config file, relative to this one."},
        **schema["properties"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


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


# --- explaining -------------------------------------------------------------------------------------------


def _explain(error: ValidationError, settings: dict[str, Any]) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    schema = Config.model_json_schema()
    path, section, field = _locate(first["loc"], schema, settings)
    key = ".".join(path)
    value = _shorten(first["input"]) if first["type"] != "missing" else _shorten(_value_at(path, settings))
    match first["type"]:
        case "extra_forbidden":
            prefix = "".join(f"{part}." for part in path[:-1])
            nearest = _nearest(path[-1], section.get("properties", {}), prefix)
            return f"config: unknown key {key} = {value}; {nearest}{more}"
        case "union_tag_invalid" | "union_tag_not_found":
            name = first["ctx"]["discriminator"].strip("'")
            allowed = [tag.strip().strip("'") for tag in first["ctx"].get("expected_tags", "").split(",") if tag]
            if "tag" not in first["ctx"]:
                return f"config: {key}.{name} is missing{more}"
            nearest = _nearest(first["ctx"]["tag"], allowed)
            return f"config: {key}.{name} = {json.dumps(first['ctx']['tag'])} is not known; {nearest}{more}"
        case "value_error":
            where = f"{key}: " if key else ""
            return f"config: {where}{first['ctx']['error']}{more}"
    nearest = ""
    if isinstance(first["input"], str) and (close := difflib.get_close_matches(first["input"], _choices(field))):
        nearest = f"; nearest: {close[0]!r}"
    return f"config: {key} = {value}: must be {_allowed(field, schema) or first['msg']}{nearest}{more}"


def _locate(
    loc: tuple[int | str, ...], schema: dict[str, Any], settings: Any
) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """The user's key path of a pydantic location, with the schemas of the section around it and of the value."""
    path: list[str] = []
    section: dict[str, Any] = {}
    field = schema
    here = settings
    for part in loc:
        if isinstance(part, str) and not (isinstance(here, dict) and part in here):
            # pydantic puts the tag of a union into the location: step into that kind, no key of the user's.
            mapping = field.get("discriminator", {}).get("mapping", {})
            if part in mapping:
                field = _resolve({"$ref": mapping[part]}, schema)
            continue
        if isinstance(part, int) and part >= len(here):
            break  # a list that is too short: the list itself is the matter
        path.append(str(part))
        section = field
        if isinstance(part, int):
            kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") == "array"]
            items = kinds[0].get("prefixItems", [])[part:] or [kinds[0].get("items", {})]
            field = _resolve(items[0], schema)
        else:
            field = _resolve(field.get("properties", {}).get(part, {}), schema)
        here = here[part]
    return path, section, field


def _value_at(path: list[str], settings: Any) -> Any:
    for part in path:
        settings = settings[int(part)] if isinstance(settings, list) else settings[part]
    return settings


def _resolve(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in field:
        field = schema["$defs"][field["$ref"].rsplit("/", 1)[1]]
    return field


def _nearest(given: str, valid: Iterable[str], prefix: str = "") -> str:
    names = list(valid)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    if close:
        return f"nearest: {prefix}{close[0]} (allowed: {', '.join(names)})"
    return f"allowed: {', '.join(names)}" if names else "no keys are allowed here"


def _choices(field: dict[str, Any]) -> list[str]:
    kinds = field.get("anyOf", [field])
    return [str(value) for kind in kinds for value in kind.get("enum", [kind["const"]] if "const" in kind else [])]


_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "minItems": "with at least",
    "maxItems": "with at most",
}
_TYPES = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "array": "a list",
    "object": "a section",
    "null": "null",
}


def _allowed(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a schema accepts, in words: 'an integer above 0'."""
    field = _resolve(field, schema)
    if "oneOf" in field:
        return "a section"
    if "anyOf" in field:
        return " or ".join(_allowed(kind, schema) for kind in field["anyOf"])
    if "const" in field or "enum" in field:
        values = field.get("enum", [field.get("const")])
        return ("one of " if len(values) > 1 else "") + ", ".join(json.dumps(value) for value in values)
    words = _TYPES.get(field.get("type", ""), "")
    bounds = [f"{word} {field[bound]:g}" for bound, word in _BOUNDS.items() if bound in field]
    if field.get("type") == "array" and bounds:
        bounds = sorted(set(bounds))
        same = field.get("minItems") == field.get("maxItems")
        return f"a list of {field['minItems']} values" if same else f"a list {' and '.join(bounds)} values"
    pattern = [f"matching {field['pattern']}"] if "pattern" in field else []
    return " ".join([words, " and ".join(bounds + pattern)]).strip()


def _shorten(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
