"""Records of a run: one JSON object a line in metrics.jsonl, with `kind` ("train" or "evaluation") and `step`.

Knows JSON and numbers; must not know what a metric means.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


def to_json_line(record: Record) -> str:
    """One line, without its end. JSON has no NaN and no infinity: they become null."""
    return json.dumps({key: finite(value) for key, value in record.items()}, allow_nan=False)


def finite(value: Any) -> Any:
    """The value, or None for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(record: Record) -> dict[str, int | float]:
    """What a tracker plots: the finite numbers of a record by "kind/name", for example "train/loss"."""
    return {
        f"{record['kind']}/{key}": value
        for key, value in record.items()
        if key not in ("step", "time") and isinstance(value, int | float) and finite(value) is not None
    }


def number(value: Any) -> float | None:
    """A finite number as it is; None for anything else that a file may have in its place."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object in an object; {} where there is none."""
    found = content.get(name)
    return found if isinstance(found, Mapping) else {}


def read_object(path: Path) -> tuple[dict[str, Any], str | None]:
    """A JSON object and what is wrong with it; {} where there is no such file, or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    except OSError as error:
        return {}, f"{path.name} cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        content = None
    return (content, None) if isinstance(content, dict) else ({}, f"{path.name} is damaged")


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The valid records of a file, in its order, and how many lines are damaged.

    A valid record is an object with an integer `step`. A last line without a line end is what a killed process was
    writing: it is left out and not counted as damaged. A file that does not exist has no records.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.exists():
        return [], 0
    *lines, _ = path.read_bytes().split(b"\n")
    records = [record for record in map(_parse, lines) if record is not None]
    return records, len(lines) - len(records)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(record, dict) and type(record.get("step")) is int
    return record if valid else None
