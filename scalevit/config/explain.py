"""What pydantic finds wrong, in one line: the key, its value, what is allowed and the nearest valid name."""

import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from scalevit.config.tree import Config
from scalevit.errors import nearest_hint


def explain(error: ValidationError, settings: dict[str, Any]) -> str:
    """One line for the first problem, with the number of further ones.

    Args:
        settings: what was validated, nested.
    """
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
            hint = _hint(path[-1], section.get("properties", {}), prefix)
            return f"config: unknown key {key} = {value}{hint}{more}"
        case "union_tag_invalid" | "union_tag_not_found":
            name = first["ctx"]["discriminator"].strip("'")
            tags = [tag.strip().strip("'") for tag in first["ctx"].get("expected_tags", "").split(",") if tag]
            if "tag" not in first["ctx"]:
                return f"config: {key}.{name} is missing{more}"
            hint = _hint(first["ctx"]["tag"], tags)
            return f"config: {key}.{name} = {json.dumps(first['ctx']['tag'])} is not known{hint}{more}"
        case "value_error":
            where = f"{key}: " if key else ""
            return f"config: {where}{first['ctx']['error']}{more}"
    hint = nearest_hint(first["input"], _choices(field)) if isinstance(first["input"], str) else ""
    return f"config: {key} = {value}: must be {allowed(field, schema) or first['msg']}{hint}{more}"


def key_path(loc: tuple[int | str, ...], settings: dict[str, Any]) -> list[str]:
    """The user's key path of a location in a `ValidationError`, e.g. ["engine", "stage"]."""
    return _locate(loc, Config.model_json_schema(), settings)[0]


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
            # pydantic puts the tag of a union into the location: step into that type; it is not a key of the user's.
            mapping = field.get("discriminator", {}).get("mapping", {})
            if part in mapping:
                field = _resolve({"$ref": mapping[part]}, schema)
            continue
        if isinstance(part, int) and part >= len(here):
            break  # a list that is too short: the problem is the list itself
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


def _hint(given: str, valid: Iterable[str], prefix: str = "") -> str:
    names = list(valid)
    if not names:
        return "; no keys are allowed here"
    allowed_names = f"allowed: {', '.join(names)}"
    close = nearest_hint(given, names, prefix=prefix)
    return f"{close} ({allowed_names})" if close else f"; {allowed_names}"


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


def allowed(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a schema accepts, in words: 'an integer above 0'."""
    field = _resolve(field, schema)
    if "oneOf" in field:
        return "a section"
    if "anyOf" in field:
        return " or ".join(allowed(kind, schema) for kind in field["anyOf"])
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
