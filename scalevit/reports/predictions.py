"""What a run has stored of its last evaluation (predictions.json), checked: it may be damaged or of another version.

Knows that file and classes.json. Must not know how it is shown.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalevit.runs.summary import EMA, WEIGHTS

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_BYTES = 200_000
"""Of one image."""


@dataclass(frozen=True)
class SavedImage:
    """A validation image with what was predicted."""

    label: int
    predicted: int
    probability: float
    png: str
    """In base64."""


@dataclass(frozen=True)
class SavedPredictions:
    """Of one evaluation of one weight set."""

    epoch: int
    weight_set: str
    confusion: Mapping[tuple[int, int], int] | None
    """By label and predicted class, those that occur; None where there are too many classes."""
    examples: Sequence[SavedImage]
    mistakes: Sequence[SavedImage]
    """The surest first."""
    class_names: Sequence[str]
    """Of classes 0...; numbers where the run knows no names."""

    def name(self, index: int) -> str:
        return self.class_names[index] if index < len(self.class_names) else str(index)

    def by_class(self) -> list[tuple[int, int, int, tuple[int, int] | None]]:
        """For each class with images: its index, images, those with its own label predicted, and the class that the
        others are taken for most often with their number; the worst first."""
        rows: dict[int, dict[int, int]] = {}
        for (label, predicted), count in (self.confusion or {}).items():
            rows.setdefault(label, {})[predicted] = count
        found = []
        for label, counts in rows.items():
            others = sorted((-count, predicted) for predicted, count in counts.items() if predicted != label)
            most = (others[0][1], -others[0][0]) if others else None
            found.append((label, sum(counts.values()), counts.get(label, 0), most))
        return sorted(found, key=lambda row: (row[2] / row[1], row[0]))


def read_predictions(folder: Path) -> SavedPredictions | None:
    """Those of a run folder; None if it has none, or they cannot be read."""
    content = _json(folder / "predictions.json")
    if not isinstance(content, Mapping):
        return None
    try:
        confusion = content["confusion"]
        counts = None if confusion is None else {(int(a), int(b)): int(count) for a, b, count in confusion}
        if counts is not None and any(min(*place, count - 1) < 0 for place, count in counts.items()):
            return None
        examples, mistakes = ([_image(one) for one in content[key]] for key in ("examples", "mistakes"))
        epoch, weight_set = int(content["epoch"]), content["weight_set"]
    except (LookupError, TypeError, ValueError):
        return None
    if weight_set not in (EMA, WEIGHTS):
        return None
    names = _json(folder / "classes.json")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        names = [str(index) for index in range(1 + max((max(place) for place in counts or ()), default=-1))]
    return SavedPredictions(epoch, weight_set, counts, examples, mistakes, names)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _image(record: Mapping[str, Any]) -> SavedImage:
    """
    Raises:
        ValueError: it is not an image.
    """
    png = str(record["png"])
    if len(png) > _MOST_BYTES or not base64.b64decode(png, validate=True).startswith(_PNG):
        raise ValueError("not a small PNG")
    return SavedImage(int(record["label"]), int(record["predicted"]), float(record["probability"]), png)
