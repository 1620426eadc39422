"""The end of a transform, for a whole batch and on its device: normalisation and random erasing.

Knows tensors and the keys of rows; must not know images, files or loaders.
"""

import math

import numpy as np
import torch
from torch import Tensor

from scalevit.data.transforms.base import Channels
from scalevit.randomness import uniforms

_ATTEMPTS = 10


class DeviceTransform:
    """Normalises a batch and erases rectangles. What an image gets follows from its row's key.

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

    def __call__(self, images: Tensor, keys: np.ndarray | None = None) -> Tensor:
        """Returns images as float32, in the same memory format.

        Args:
            images: (m, 3, S, S) uint8.
            keys: (m,) uint64, of the rows (`randomness.row_keys`); None erases nothing.
        """
        factor, shift = self._factor.to(images.device), self._shift.to(images.device)
        if images.is_contiguous(memory_format=torch.channels_last):
            # By rows: on a CPU, broadcasting along an innermost dimension of three takes ten times as long.
            side = images.shape[3]
            rows = images.permute(0, 2, 3, 1).flatten(2).to(torch.float32)
            torch.addcmul(shift.repeat(side), rows, factor.repeat(side), out=rows)
            normalised = rows.unflatten(2, (side, 3)).permute(0, 3, 1, 2)
        else:
            normalised = images.to(torch.float32).mul_(factor.view(3, 1, 1)).add_(shift.view(3, 1, 1))
        if self.random_erasing and keys is not None:
            self._erase(normalised, keys)
        return normalised

    def _erase(self, images: Tensor, keys: np.ndarray) -> None:
        draws = uniforms(keys, 1 + 4 * _ATTEMPTS)
        noise = torch.Generator(images.device)
        for row in np.flatnonzero(draws[:, 0] < self.random_erasing):
            box = _rectangle(draws[row, 1:].reshape(_ATTEMPTS, 4), *images.shape[2:])
            if box is not None:
                top, left, h, w = box
                noise.manual_seed(int(keys[row] >> np.uint64(1)))
                rectangle = torch.randn(images.shape[1], h, w, generator=noise, device=images.device)
                images[row, :, top : top + h, left : left + w] = rectangle


def _rectangle(draws: np.ndarray, height: int, width: int) -> tuple[int, int, int, int] | None:
    """Top, left, height and width, as timm's RandomErasing draws them with its default sizes: 2 to 33 % of the area and
    aspect ratios from 0.3 to 1 / 0.3. None: no attempt fits into the image.

    Args:
        draws: (attempts, 4), uniform.
    """
    for area, ratio, top, left in draws:
        pixels = (0.02 + (1 / 3 - 0.02) * area) * height * width
        aspect = math.exp(math.log(0.3) * (1 - 2 * ratio))
        h, w = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if h < height and w < width:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    return None
