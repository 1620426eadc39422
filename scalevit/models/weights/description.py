"""What a weights file of ours says about itself in its metadata. Knows no tensors."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

METADATA_KEY = "scalevit"
"""Of the JSON object that our files carry in their safetensors metadata: `model`, `reduction`, `tied`, `classes`."""


def own_metadata(file: Any) -> dict[str, Any]:
    """What an opened safetensors file of ours says; {} for a file of another program.

    Raises:
        ValueError: it is no JSON object.
    """
    content = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    kinds = {"model": dict, "reduction": dict, "tied": dict, "classes": list | None}
    if not isinstance(content, dict) or not all(
        isinstance(content[key], kind) for key, kind in kinds.items() if key in content
    ):
        raise ValueError(f"its metadata {METADATA_KEY} is not as scalevit writes it")
    return content


def read_description(path: Path) -> dict[str, Any]:
    """`model`, `reduction`, `tied` and `classes` of a file of ours; {} for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return own_metadata(file)
    except (OSError, ValueError, SafetensorError):
        return {}
