"""What pydantic finds wrong, in one line: the key, its value, what is allowed and the nearest valid name."""

import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from scalevit.config.keys import find_key
from scalevit.config.schema_fields import allowed, resolve, sections
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
            return f"config: unknown key {key} = {value}{_hint_for_key(path, section)}{more}"
        case "union_tag_invalid" | "union_tag_not_found":
            name = first["ctx"]["discriminator"].strip("'")
            tags = [tag.strip().strip("'") for tag in first["ctx"].get("expected_tags", "").split(",") if tag]
            if "tag" not in first["ctx"]:
                return f"config: {key}.{name} is missing{more}"
            hint = _hint(first["ctx"]["tag"], tags)
            return f"config: {key}.{name} = {json.dumps(first['ctx']['tag'])} is not known{hint}{more}"
        case "value_error":
            # A section's own rule often begins with the name of one of its settings: `widths = [...]: must ...`.
            text = str(first["ctx"]["error"])
            names_setting = text.partition(" = ")[0] in field.get("properties", {})
            where = f"{key}{'.' if names_setting else ': '}" if key else ""
            return f"config: {where}{text}{more}"
    hint = nearest_hint(first["input"], _choices(field)) if isinstance(first["input"], str) else ""
    if selector := _selector(first["input"], field, schema):
        hint = f"; set {key}.{selector} = {value}"
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
                field = resolve({"$ref": mapping[part]}, schema)
            continue
        if isinstance(part, int) and part >= len(here):
            break  # a list that is too short: the problem is the list itself
        path.append(str(part))
        section = field
        if isinstance(part, int):
            kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") == "array"]
            items = kinds[0].get("prefixItems", [])[part:] or [kinds[0].get("items", {})]
            field = resolve(items[0], schema)
        else:
            field = resolve(field.get("properties", {}).get(part, {}), schema)
        here = here[part]
    return path, section, field


def _value_at(path: list[str], settings: Any) -> Any:
    for part in path:
        settings = settings[int(part)] if isinstance(settings, list) else settings[part]
    return settings


def _hint_for_key(path: list[str], section: dict[str, Any]) -> str:
    """The end of a message about an unknown key: the key that was meant, or those of its section."""
    properties = section.get("properties", {})
    key = ".".join(path)
    # Equal where the key is one of another type of this section, whose own keys are then listed.
    if not nearest_hint(path[-1], properties, cutoff=0.8) and (found := find_key(key)) and found != key:
        return f"; nearest: {found}"
    return _hint(path[-1], properties, "".join(f"{part}." for part in path[:-1]))


def _selector(value: Any, field: dict[str, Any], schema: dict[str, Any]) -> str | None:
    """The key in a section by which such a value chooses it or turns it on; None where the field is no section."""
    keys = [key for found in sections(field, schema) or [field] for key in found.get("properties", {})]
    selectors = ("enabled",) if isinstance(value, bool) else ("strategy", "name")
    return next((key for key in selectors if key in keys), None)


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


def _shorten(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
