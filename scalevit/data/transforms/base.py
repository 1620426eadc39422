"""What all transforms have in common. Knows types and values only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

Colour = tuple[float, float, float]
"""Red, green and blue, in 0..1."""

Channels = tuple[float, ...]
"""A value per channel, red, green and blue or grey, in 0..1."""

Transform = Callable[[Any], Tensor]
"""From an RGB image to a tensor: a Pillow image, or an array if it is an `ArrayTransform`."""


@dataclass(frozen=True, kw_only=True)
class TrainingAugmentation:
    """What timm's training transform and ours are built from; the values are drawn for each image."""

    image_size: int
    """Side in pixels."""
    mean: Colour
    """Colour of the pixels that a rotation leaves empty."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop relative to the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop."""
    crop_mode: str = "rrc"
    """timm's `train_crop_mode`: rrc, rkrc or rkrr."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    vflip: float = 0.0
    """Probability of a vertical flip."""
    color_jitter: float = 0.4
    """Strength; with auto_augment only for policies whose name has "3a"."""
    color_jitter_prob: float | None = None
    """Probability of the jitter; None applies it to every image."""
    grayscale_prob: float = 0.0
    """Probability that an image is turned grey."""
    gaussian_blur_prob: float = 0.0
    """Probability of a blur with a kernel of 23 pixels."""
    auto_augment: str | None = None
    """timm's policy, e.g. "rand-m9-mstd0.5-inc1"."""
    interpolation: str = "random"
    """bilinear, bicubic or random."""
    splits: int = 0
    """Views of each image that the transform returns as (splits, 3, S, S), for a loss that compares them: all have the
    same crop and flips; the first one is clean, the others are augmented each for itself (timm's AugMixDataset). 0: one
    augmented image, (3, S, S)."""


class ArrayTransform:
    """Base class of transforms that take an image as an (H, W, 3) uint8 array; all others take a Pillow image (RGB)."""

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """
        Raises:
            NotImplementedError: by this base class.
        """
        raise NotImplementedError
