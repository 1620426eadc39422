"""Grey images for models with one input channel. Knows Pillow's conversion and the two kinds of transforms."""

import numpy as np
from PIL import Image
from torch import Tensor

from scalevit.data.transforms.base import ArrayTransform, Channels, Transform


def in_grey(transform: Transform) -> Transform:
    """A transform of RGB images that sees an image in grey (Pillow's "L", as timm's input mode) and gives one channel:
    (1, S, S), or (splits, 1, S, S).
    """
    return _GreyArrays(transform) if isinstance(transform, ArrayTransform) else _GreyImages(transform)


def for_channels(values: Channels, channels: int) -> Channels:
    """The mean or standard deviation of RGB images for another number of channels: their average, as timm takes it."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels


class _GreyImages:
    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def __call__(self, image: Image.Image) -> Tensor:
        return _first_channel(self._transform(_grey(image)))


class _GreyArrays(ArrayTransform):
    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def __call__(self, pixels: np.ndarray) -> Tensor:
        return _first_channel(self._transform(np.array(_grey(Image.fromarray(pixels)))))


def _grey(image: Image.Image) -> Image.Image:
    """RGB with three equal channels, which every augmentation keeps equal."""
    return image.convert("L").convert("RGB")


def _first_channel(images: Tensor) -> Tensor:
    return images[..., :1, :, :].contiguous()
