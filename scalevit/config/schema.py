"""The JSON schema of a config file, for editors and for the documentation."""

from typing import Any

from scalevit.config.tree import Config


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, as in `configs/schema.json`."""
    schema = Config.model_json_schema()
    schema["properties"] = {
        "$schema": {"type": "string", "description": "This schema, for editors."},
        "extends": {"type": "string", "description": "Another config file, relative to this one."},
        **schema["properties"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
