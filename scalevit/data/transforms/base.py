"""What all transforms have in common. Knows types and values only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

Channels = tuple[float, float, float]
"""A value per colour channel, red, green, blue, in 0..1."""

Transform = Callable[[Any], Tensor]
"""From an RGB image to a tensor: a Pillow image, or an array if it is an `ArrayTransform`."""


@dataclass(frozen=True, kw_only=True)
class TrainingAugmentation:
    """What timm's training transform and ours are built from; the values are drawn for each image."""

    image_size: int
    """Side in pixels."""
    mean: Channels
    """Colour of the pixels that a rotation leaves empty."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop relative to the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.4
    """Strength, not used together with auto_augment."""
    auto_augment: str | None = None
    """timm's policy, e.g. "rand-m9-mstd0.5-inc1"."""
    interpolation: str = "random"
    """bilinear, bicubic or random."""


class ArrayTransform:
    """Base class of transforms that take an image as an (H, W, 3) uint8 array; all others take a Pillow image (RGB)."""

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """
        Raises:
            NotImplementedError: by this base class.
        """
        raise NotImplementedError
