"""What a weights file of ours says about itself in its metadata. Knows no tensors."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from scalevit.models.weights.read import METADATA_KEY


def read_description(path: Path) -> dict[str, Any]:
    """`model`, `reduction`, `tied` and `classes` of a file of ours; {} for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (OSError, ValueError, SafetensorError):
        return {}
    return content if isinstance(content, dict) else {}
