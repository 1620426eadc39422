"""What a JSON schema says of a setting: the sections that it may be, its values in words. Knows JSON schemas only."""

import json
from typing import Any

Schema = dict[str, Any]


def resolve(field: Schema, schema: Schema) -> Schema:
    """The field itself, where it only refers to one.

    Args:
        schema: whole, with the definitions.
    """
    while "$ref" in field:
        field = schema["$defs"][field["$ref"].rsplit("/", 1)[1]]
    return field


def sections(field: Schema, schema: Schema) -> list[Schema]:
    """The sections that a field may be; none for a plain value."""
    references = [kind["$ref"] for kind in (field, *field.get("oneOf", ())) if "$ref" in kind]
    return [schema["$defs"][reference.rsplit("/", 1)[1]] for reference in references]


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


def allowed(field: Schema, schema: Schema) -> str:
    """What a schema accepts, in words: 'an integer above 0'."""
    field = resolve(field, schema)
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
