"""What the page of a run shows of an evaluation: the confusion of classes, and images with what was predicted.

Collected beside the metrics, without a read of a device value for each batch. Must not know pages or run folders.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from scalevit.distributed import World
from scalevit.training.metrics import Predictions

MOST_CLASSES = 1000
"""A matrix of more classes would take more memory than a model."""
_LARGEST_SIDE = 96
"""Of a stored image, in pixels."""


class PredictionLog:
    """Of one evaluation of one weight set. Images are those of this rank."""

    def __init__(self, images: int, rows: int):
        """
        Args:
            images: number of images that are kept, and of mistakes; 0 keeps none.
            rows: of this rank, from which the images are taken at equal distances.
        """
        self._keep = images
        self._places = {round(index * rows / images) for index in range(images)} if images else set()
        self._seen = 0
        self._confusion: Tensor | None = None
        self._classes = 0
        self._examples: list[_Rows] = []
        self._mistakes: _Rows | None = None

    def add(self, pixels: Tensor, predictions: Predictions, weights: Tensor) -> None:
        """One batch.

        Args:
            pixels: (b, C, S, S) uint8, not normalised.
            predictions: of the batch, on the same device.
            weights: (b,); 0 for padding.
        """
        predicted, labels = predictions.ranked[:, 0], predictions.labels
        counted = (weights > 0) & predictions.decoded
        self._count(predictions.logits.shape[1], predicted, labels, counted)
        if not self._keep:
            return
        certainty = predictions.logits.softmax(1).gather(1, predicted[:, None])[:, 0]
        batch = _Rows(pixels, labels, predicted, certainty, counted)
        here = [place - self._seen for place in sorted(self._places) if 0 <= place - self._seen < len(labels)]
        self._seen += len(labels)
        if here:
            self._examples.append(batch.take(torch.tensor(here, device=labels.device)))
        mistakes = batch.surest_mistakes(self._keep)
        if self._mistakes is not None:
            mistakes = _Rows.joined([self._mistakes, mistakes]).surest_mistakes(self._keep)
        self._mistakes = mistakes

    def _count(self, classes: int, predicted: Tensor, labels: Tensor, counted: Tensor) -> None:
        if classes > MOST_CLASSES:
            return
        if self._confusion is None:
            self._classes = classes
            self._confusion = torch.zeros(classes * classes, dtype=torch.int64, device=labels.device)
        self._confusion.index_add_(0, labels * classes + predicted, counted.long())

    def to_record(self, world: World) -> dict[str, Any]:
        """As JSON. Collective.

        Returns:
            confusion: [label, predicted class, images] of the pairs that occur, over all ranks; None for more than
                MOST_CLASSES classes.
            examples, mistakes: images of this rank with label, predicted class, its probability, and a PNG in base64;
                the surest mistakes first.
        """
        confusion = None
        if self._confusion is not None:
            matrix = world.all_reduce_sum(self._confusion).view(self._classes, self._classes).cpu()
            confusion = [[*place, int(matrix[tuple(place)])] for place in matrix.nonzero().tolist()]
        examples = _Rows.joined(self._examples).to_records() if self._examples else []
        mistakes = [] if self._mistakes is None else self._mistakes.to_records(only_mistakes=True)
        return {"confusion": confusion, "examples": examples, "mistakes": mistakes}


class _Rows:
    """Images with what was predicted."""

    def __init__(self, pixels: Tensor, labels: Tensor, predicted: Tensor, certainty: Tensor, counted: Tensor):
        self.pixels, self.labels, self.predicted = pixels, labels, predicted
        self.certainty, self.counted = certainty, counted

    def _fields(self) -> tuple[Tensor, ...]:
        return self.pixels, self.labels, self.predicted, self.certainty, self.counted

    def take(self, rows: Tensor) -> "_Rows":
        """A copy of some rows."""
        return _Rows(*(field[rows] for field in self._fields()))

    def surest_mistakes(self, most: int) -> "_Rows":
        """At most this number of rows, the surest mistakes first; others may follow them."""
        surest = torch.where(self.counted & (self.predicted != self.labels), self.certainty, -1.0)
        return self.take(surest.topk(min(most, len(surest))).indices)

    @classmethod
    def joined(cls, parts: "list[_Rows]") -> "_Rows":
        return cls(*(torch.cat(fields) for fields in zip(*(part._fields() for part in parts), strict=True)))

    def to_records(self, *, only_mistakes: bool = False) -> list[Mapping[str, Any]]:
        """Those that count: neither padding nor images that cannot be decoded."""
        pixels, *numbers, counted = (field.cpu() for field in self._fields())
        rows = zip(pixels, *(column.tolist() for column in numbers), counted.tolist(), strict=True)
        return [
            {"label": label, "predicted": predicted, "probability": round(certainty, 4), "png": _png(image)}
            for image, label, predicted, certainty, is_counted in rows
            if is_counted and not (only_mistakes and label == predicted)
        ]


def _png(pixels: Tensor) -> str:
    """(C, S, S) uint8, of one or three channels, as a small PNG in base64."""
    array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
