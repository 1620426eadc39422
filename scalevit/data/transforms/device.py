"""The end of a transform, for a whole batch and on its device: normalisation and random erasing.

Knows tensors and the keys of rows; must not know images, files or loaders.
"""

import math
from typing import Literal

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
        random_erasing: probability that an image is erased in places (timm's RandomErasing).
        mode: what a rectangle is filled with: "pixel" normal noise, "rand" one colour of normal noise, "const" zeros.
        count: maximum number of rectangles of an image; between 1 and this, and as many times smaller.
        splits: views of each row in a batch, see `loading.base.Batch`.
        clean_split: spare a part of the images: their first views, or without views the even rows.
    """

    def __init__(
        self,
        *,
        mean: Channels,
        std: Channels,
        random_erasing: float = 0.0,
        mode: Literal["pixel", "rand", "const"] = "pixel",
        count: int = 1,
        splits: int = 1,
        clean_split: bool = False,
    ) -> None:
        self.random_erasing = random_erasing
        self._mode, self._count = mode, count
        self._splits, self._clean_split = splits, clean_split
        # (x / 255 - mean) / std as one multiplication and one addition.
        self._factor = torch.tensor([1 / (255 * s) for s in std])
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])

    def __call__(self, images: Tensor, keys: np.ndarray | None = None) -> Tensor:
        """Returns images as float32, in the same memory format.

        Args:
            images: (m, C, S, S) uint8, with as many channels as mean and std have values.
            keys: (m,) uint64, of the rows (`randomness.row_keys`); None erases nothing.
        """
        factor, shift = self._factor.to(images.device), self._shift.to(images.device)
        if images.is_contiguous(memory_format=torch.channels_last):
            # By rows: on a CPU, broadcasting along an innermost dimension of three takes ten times as long.
            channels, side = images.shape[1], images.shape[3]
            rows = images.permute(0, 2, 3, 1).flatten(2).to(torch.float32)
            torch.addcmul(shift.repeat(side), rows, factor.repeat(side), out=rows)
            normalised = rows.unflatten(2, (side, channels)).permute(0, 3, 1, 2)
        else:
            normalised = images.to(torch.float32).mul_(factor.view(-1, 1, 1)).add_(shift.view(-1, 1, 1))
        if self.random_erasing and keys is not None:
            self._erase(normalised, keys)
        return normalised

    def _erase(self, images: Tensor, keys: np.ndarray) -> None:
        # The first draw is whether, then those of the rectangles, and the last is how many there are.
        draws = uniforms(keys, 2 + 4 * _ATTEMPTS * self._count)
        erased = draws[:, 0] < self.random_erasing
        if self._clean_split and self._splits > 1:
            erased[: len(images) // self._splits] = False
        elif self._clean_split:
            erased[::2] = False  # a loader's rows begin with an even one
        noise, (height, width) = torch.Generator(images.device), images.shape[2:]
        for row in np.flatnonzero(erased):
            noise.manual_seed(int(keys[row] >> np.uint64(1)))
            count = 1 + int(draws[row, -1] * self._count)
            for attempts in draws[row, 1:-1].reshape(self._count, _ATTEMPTS, 4)[:count]:
                box = _rectangle(attempts, height, width, count)
                if box is not None:
                    top, left, h, w = box
                    place = images[row, :, top : top + h, left : left + w]
                    place.copy_(self._filling(images.shape[1], h, w, noise))

    def _filling(self, channels: int, height: int, width: int, noise: torch.Generator) -> Tensor:
        shape = (channels, height, width) if self._mode == "pixel" else (channels, 1, 1)
        if self._mode == "const":
            return torch.zeros(shape, device=noise.device)
        return torch.randn(shape, generator=noise, device=noise.device)


def _rectangle(draws: np.ndarray, height: int, width: int, count: int) -> tuple[int, int, int, int] | None:
    """Top, left, height and width, as timm's RandomErasing draws them with its default sizes: 2 to 33 % of the area,
    divided by the number of rectangles, and aspect ratios from 0.3 to 1 / 0.3. None: no attempt fits into the image.

    Args:
        draws: (attempts, 4), uniform.
        height: of the image.
        width: of the image.
        count: rectangles of the image.
    """
    for area, ratio, top, left in draws:
        pixels = (0.02 + (1 / 3 - 0.02) * area) * height * width / count
        aspect = math.exp(math.log(0.3) * (1 - 2 * ratio))
        h, w = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if h < height and w < width:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    return None
