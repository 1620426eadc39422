"""The JSON schema of a config file, for editors and for the documentation."""

from typing import Any

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
