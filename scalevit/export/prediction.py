"""Classes and probabilities of single images, as an evaluation sees them. Needs no process group."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scalevit.data.images import CONVERTIBLE, UndecodableImage, kind_of, to_png
from scalevit.data.loading.dataset import decoder_for
from scalevit.export.classifier import Classifier


class Prediction(NamedTuple):
    """What a model says of one image."""

    labels: tuple[int, ...]
    """The most probable first."""
    probabilities: tuple[float, ...]
    """Of those labels, by softmax over all classes."""
    error: str | None = None
    """Why the image cannot be read; then the others are empty."""


class Predictor:
    """Reads image files and classifies them.

    Args:
        exif_orientation: turn images as their EXIF records say.
    """

    def __init__(self, classifier: Classifier, *, exif_orientation: bool) -> None:
        self._classifier = classifier
        self._decode = decoder_for(classifier.transform, exif_orientation=exif_orientation)

    def predict(self, paths: Sequence[Path], *, top: int, batch: int) -> Iterator[Prediction]:
        """Predicts image files, one after the other; an image that cannot be read has the reason.

        Args:
            paths: of JPEG, PNG, WebP, GIF, BMP and TIFF files.
            top: classes of each; all if there are no more.
            batch: images of a forward pass.
        """
        for start in range(0, len(paths), batch):
            loaded = [self._load(path) for path in paths[start : start + batch]]
            images = [image for image in loaded if isinstance(image, Tensor)]
            predicted = iter(self._forward(torch.stack(images), top) if images else ())
            for image in loaded:
                yield next(predicted) if isinstance(image, Tensor) else Prediction((), (), image)

    def _load(self, path: Path) -> Tensor | str:
        """The model's input, or why there is none."""
        try:
            payload = path.read_bytes()
            if kind_of(payload) is None and path.suffix[1:].lower() in CONVERTIBLE:
                payload = to_png(payload)
            return self._classifier.transform(self._decode(payload))
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        except UndecodableImage as error:
            return f"cannot be decoded ({error})"

    def _forward(self, images: Tensor, top: int) -> list[Prediction]:
        logits = self._classifier.logits(self._classifier.finish(images.to(self._classifier.device)))
        probabilities, labels = logits.softmax(1).topk(min(top, logits.shape[1]), dim=1)
        rows = zip(labels.tolist(), np.asarray(probabilities.cpu(), np.float64).tolist(), strict=True)
        return [Prediction(tuple(row), tuple(values)) for row, values in rows]
