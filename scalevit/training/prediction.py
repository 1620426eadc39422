"""Classes and probabilities of single images, as an evaluation sees them. Needs no process group."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scalevit.config.tree import SECTIONS, Config
from scalevit.data.images import CONVERTIBLE, UndecodableImage, kind_of, to_png
from scalevit.data.loading.dataset import decoder_for
from scalevit.distributed import World
from scalevit.engines.precision import DTYPES
from scalevit.errors import naming_settings
from scalevit.models.build import build_model
from scalevit.models.weights.read import read_classes
from scalevit.training.open_data import device_transform_of, evaluation_transform_of
from scalevit.training.run import with_model_defaults


class Prediction(NamedTuple):
    """What a model says of one image."""

    labels: tuple[int, ...]
    """The most probable first."""
    probabilities: tuple[float, ...]
    """Of those labels, by softmax over all classes."""
    error: str | None = None
    """Why the image cannot be read; then the others are empty."""


class Predictor:
    """The model with the config's initial weights, on a GPU where there is one.

    Args:
        config: of the run.

    Raises:
        UserError: the weights do not fit the config's model, or have another classifier.
    """

    def __init__(self, config: Config) -> None:
        config = with_model_defaults(config)
        weights = config.model.weights_source
        assert weights is not None, "checked by the caller"
        self.classes = read_classes(weights)
        """Names of the labels, where the file has them."""
        self.device = World.from_environment().device
        with naming_settings(SECTIONS):
            model = build_model(
                config.model,
                config.reduction,
                seed=config.seed,
                kernels=config.kernels,
                run_device=self.device,
                need_classifier=True,
            )
        self._model = model.to(self.device).eval()
        self._transform = evaluation_transform_of(config)
        self._finish = device_transform_of(config)
        self._decode = decoder_for(self._transform, exif_orientation=config.data.exif_orientation)
        # As the engines do, which have no mixed precision on a CPU other than by autocast.
        self._autocast = torch.autocast(
            self.device.type, DTYPES[config.train.precision], enabled=config.train.precision != "fp32"
        )

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
            return self._transform(self._decode(payload))
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        except UndecodableImage as error:
            return f"cannot be decoded ({error})"

    @torch.inference_mode()
    def _forward(self, images: Tensor, top: int) -> list[Prediction]:
        with self._autocast:
            logits = self._model(self._finish(images.to(self.device)))
        probabilities, labels = logits.float().softmax(1).topk(min(top, logits.shape[1]), dim=1)
        rows = zip(labels.tolist(), np.asarray(probabilities.cpu(), np.float64).tolist(), strict=True)
        return [Prediction(tuple(row), tuple(values)) for row, values in rows]
