"""All keys of the config, from its schema."""

from collections.abc import Iterator
from typing import Any

from scalevit.config.schema import json_schema


def config_keys() -> dict[str, dict[str, Any]]:
    """The schema of every key by its dotted path, e.g. "train.micro_batch", sections included."""
    schema = json_schema()
    return {key: field for key, field in _walk(schema, schema, "") if key not in ("$schema", "extends", "about")}


def _walk(section: dict[str, Any], schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in section.get("properties", {}).items():
        types = [kind["$ref"] for kind in (field, *field.get("oneOf", ())) if "$ref" in kind]
        sections = [schema["$defs"][reference.rsplit("/", 1)[1]] for reference in types]
        yield prefix + name, {**sections[0], **field} if len(sections) == 1 else field
        for inner in sections:
            yield from _walk(inner, schema, f"{prefix}{name}.")
