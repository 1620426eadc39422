"""The text of a config file, in the style of our presets: what fits is on one line."""

import json
from typing import Any

_WIDTH = 110


def config_text(settings: dict[str, Any], note: dict[str, str]) -> str:
    """The content of a file.

    Args:
        settings: nested.
        note: the file's "about".
    """
    return _text({"about": note, **settings}, 0) + "\n"


def _text(value: Any, depth: int) -> str:
    line = json.dumps(value)
    if not isinstance(value, dict) or not value:
        return line
    nested = any(isinstance(each, dict) for each in value.values())
    if depth and not nested and len(line) + 2 * depth < _WIDTH:
        return line
    indent = "  " * (depth + 1)
    rows = [f"{indent}{json.dumps(key)}: {_text(each, depth + 1)}" for key, each in value.items()]
    return "{\n" + ",\n".join(rows) + "\n" + "  " * depth + "}"
