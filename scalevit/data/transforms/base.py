"""What all transforms have in common. Knows types only."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

Channels = tuple[float, float, float]
"""A value per colour channel, red, green, blue, in 0..1."""

Transform = Callable[[Any], Tensor]
"""From an RGB image to a tensor: a Pillow image, or an array if it is an `ArrayTransform`."""


class ArrayTransform:
    """Base class of transforms that take an image as an (H, W, 3) uint8 array; all others take a Pillow image (RGB)."""

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """
        Raises:
            NotImplementedError: by this base class.
        """
        raise NotImplementedError
