"""The end of a transform, for a whole batch and on its device: normalisation and random erasing.

Knows tensors and numpy's generator; must not know images, files or loaders.
"""

import math

import numpy as np
import torch
from torch import Tensor

from scalevit.data.transforms.base import Channels


class DeviceTransform:
    """Normalises a batch and erases rectangles.

    Draws from numpy's global generator and torch's: the training loop seeds both for each micro-batch.

    Args:
        mean: of the normalisation, for values in 0..1.
        std: standard deviation, likewise.
        random_erasing: probability of one rectangle of normal noise per image (timm's pixel mode).
    """

    def __init__(self, *, mean: Channels, std: Channels, random_erasing: float = 0.0) -> None:
        self.random_erasing = random_erasing
        # (x / 255 - mean) / std as one multiplication and one addition.
        self._factor = torch.tensor([1 / (255 * s) for s in std])
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])

    def __call__(self, images: Tensor) -> Tensor:
        """images: (m, 3, S, S) uint8; returns them as float32, in the same memory format."""
        factor, shift = self._factor.to(images.device), self._shift.to(images.device)
        if images.is_contiguous(memory_format=torch.channels_last):
            # By rows: on a CPU, broadcasting along an innermost dimension of three takes ten times as long.
            side = images.shape[3]
            rows = images.permute(0, 2, 3, 1).flatten(2).to(torch.float32)
            torch.addcmul(shift.repeat(side), rows, factor.repeat(side), out=rows)
            normalised = rows.unflatten(2, (side, 3)).permute(0, 3, 1, 2)
        else:
            normalised = images.to(torch.float32).mul_(factor.view(3, 1, 1)).add_(shift.view(3, 1, 1))
        for image in normalised if self.random_erasing else ():
            if np.random.random() < self.random_erasing:
                _erase(image)
        return normalised


def _erase(image: Tensor) -> None:
    """timm's RandomErasing with its default sizes: 2 to 33 % of the area, aspect ratios from 0.3 to 1 / 0.3."""
    _, height, width = image.shape
    for _ in range(10):
        area = np.random.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(np.random.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = np.random.randint(height - h + 1), np.random.randint(width - w + 1)
            image[:, top : top + h, left : left + w] = torch.randn(3, h, w, device=image.device)
            return
