"""The JSON schema of a config file, for editors, and the page of all settings, for the documentation."""

import json
from typing import Any

from scalevit.config.schema_fields import allowed, sections
from scalevit.config.tree import Config


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, as in `configs/schema.json`. Every key has a description."""
    schema = Config.model_json_schema()
    for section in schema["$defs"].values():
        for field in section["properties"].values():
            if "const" in field:  # the key that selects a Part: the Part's own docstring says what it selects
                field.setdefault("description", section["description"])
    schema["properties"] = {
        "$schema": {"type": "string", "description": "This schema, for editors."},
        "extends": {
            "type": "string",
            "description": "A config file, relative to this one, or a preset, that this file's keys override.",
        },
        "about": {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "Notes for readers, not settings: command, hardware, expected time and results.",
        },
        **schema["properties"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


# --- the page of all settings -----------------------------------------------------------------------------

_INTRODUCTION = """\
# Configuration

All settings of a run, from the config's schema (`make schema` writes this page). A config is a JSON file; `--config`
takes its path or the name of a preset. A file can extend another (`"extends": "grouped"`: a file relative to it or a
preset); `@NAME` on the command line lays a further config over it, and `section.key=value` overrides both. The note
`"about"` is not a setting. Unknown keys and impossible values are reported in one line, before anything starts."""


def markdown() -> str:
    """A page with a table per section: every key, its type, its default and its meaning."""
    schema = json_schema()
    plain = {
        key: field
        for key, field in schema["properties"].items()
        if key not in ("$schema", "extends", "about") and not sections(field, schema)
    }
    parts = [_INTRODUCTION, *_table("", plain, schema)]
    for key, field in schema["properties"].items():
        for section in sections(field, schema):
            selector = field.get("discriminator", {}).get("propertyName")
            selected = f"{key}.{selector} = {section['properties'][selector]['const']}" if selector else key
            parts += ["", f"## {selected}", "", section["description"], *_section(key, section, schema)]
    return "\n".join(parts)


def _section(path: str, section: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    inner = {key: field for key, field in section["properties"].items() if sections(field, schema)}
    plain = {key: field for key, field in section["properties"].items() if key not in inner and "const" not in field}
    lines = _table(path + ".", plain, schema)
    for key, field in inner.items():
        for nested in sections(field, schema):
            lines += ["", f"### {path}.{key}", "", nested["description"], *_section(f"{path}.{key}", nested, schema)]
    return lines


def _table(prefix: str, fields: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    if not fields:
        return []
    lines = ["", "| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    for key, field in fields.items():
        meaning = " ".join(field.get("description", "").split())
        cells = (f"`{prefix}{key}`", allowed(field, schema), f"`{json.dumps(field['default'])}`", meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines
