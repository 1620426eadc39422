"""Mixup and CutMix on the device: timm's batch mode, whose draws depend on rows of the global batch only.

Knows tensors and numbers of rows; must not know losses, ranks or micro-batches.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scalevit.errors import SettingError
from scalevit.randomness import Purpose, hash64


class MixedLabels(NamedTuple):
    """Labels of images that may be mixed from two; a loss makes its targets from them."""

    labels: Tensor
    """(m,) int64, the images' own."""
    partners: Tensor
    """(m,) int64, the labels of the images that were mixed in."""
    weight: Tensor
    """(m,) float64, weight of the own label, 0 to 1; 1 where nothing was mixed."""
    views: int = 1
    """Of each row. The m images are the first views of all rows, then the second ones, ..., as in timm's batches."""


class MixingDraw(NamedTuple):
    """What is drawn for a group of rows."""

    weight: float
    """Of an image's own label."""
    box: tuple[int, int, int, int] | None
    """CutMix: top, bottom, left and right of the rectangle that comes from the partner. None: mixup."""


class BatchMixing:
    """Mixup and CutMix; rows 2u and 2u + 1 of the global batch are mixed with each other.

    Each group of rows has one draw, as each batch of a loader has in timm's `Mixup` (mode "batch"): whether it is
    mixed, by which of the two, the weight, and the rectangle.

    Args:
        mixup: alpha of mixup's Beta distribution; 0 turns mixup off.
        cutmix: alpha of CutMix's Beta distribution; if both are on, each group uses one of them.
        probability: that a group is mixed.
        group: rows of the global batch that have one draw; even.
        seed: of the draws.

    Raises:
        SettingError: `mixing_group` is odd.
    """

    def __init__(self, *, mixup: float, cutmix: float, probability: float, group: int = 256, seed: int = 0) -> None:
        if group % 2:
            raise SettingError("mixing_group", group, "must be even: rows are mixed in pairs")
        self._mixup, self._cutmix, self._probability, self._group, self._seed = mixup, cutmix, probability, group, seed
        self.mixes = bool(probability and (mixup or cutmix))

    def draw(self, step: int, group: int, height: int, width: int) -> MixingDraw | None:
        """What a group of a step gets; None: it is not mixed. The distributions are those of timm's `Mixup`.

        Args:
            group: number of the group in the global batch.
            height: of the images.
            width: of the images.
        """
        state = hash64(self._seed, int(Purpose.MIXING), step, group)
        generator = np.random.RandomState([state & 0xFFFFFFFF, state >> 32])  # its streams never change
        if generator.rand() >= self._probability:
            return None
        cuts = generator.rand() < 0.5 if self._mixup and self._cutmix else not self._mixup
        alpha = self._cutmix if cuts else self._mixup
        weight = float(generator.beta(alpha, alpha))
        if not cuts:
            return MixingDraw(weight, None)
        # timm's `rand_bbox`, with the weight corrected for what lies outside the image (`correct_lam`).
        ratio = math.sqrt(1 - weight)
        centers = generator.randint(height), generator.randint(width)
        (top, bottom), (left, right) = (
            (max(center - int(side * ratio) // 2, 0), min(center + (int(side * ratio) + 1) // 2, side))
            for center, side in zip(centers, (height, width), strict=True)
        )
        return MixingDraw(1.0 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))

    def __call__(self, images: Tensor, labels: Tensor, *, step: int, rows: np.ndarray) -> tuple[Tensor, MixedLabels]:
        """Mixes images in place.

        Args:
            images: (m, 3, S, S) float32, rows with their partners.
            labels: (m,) int64.
            step: number of the optimizer step.
            rows: (m,) int64, numbers in the global batch, ascending from an even one; padding is negative and last.
        """
        weights = np.ones(len(rows))
        if not self.mixes:
            return images, MixedLabels(labels, labels, _on(labels.device, weights))
        paired = (rows >= 0).sum() // 2 * 2  # the last row of an odd global batch has no partner
        groups, starts, counts = np.unique(rows[:paired] // self._group, return_index=True, return_counts=True)
        for group, start, end in zip(groups.tolist(), starts, starts + counts, strict=True):
            drawn = self.draw(step, group, *images.shape[2:])
            if drawn is not None:
                _mix_pairs(images[start:end], drawn)
                weights[start:end] = drawn.weight
        partners = labels.clone()
        partners[:paired] = labels[:paired].view(-1, 2).flip(1).flatten()
        return images, MixedLabels(labels, partners, _on(labels.device, weights))


def _mix_pairs(images: Tensor, drawn: MixingDraw) -> None:
    """images: (2n, 3, S, S), changed in place."""
    first, second = images[0::2], images[1::2]
    if drawn.box is None:
        kept = first.clone()
        first.mul_(drawn.weight).add_(second, alpha=1.0 - drawn.weight)
        second.mul_(drawn.weight).add_(kept, alpha=1.0 - drawn.weight)
        return
    top, bottom, left, right = drawn.box
    cut, other = (half[:, :, top:bottom, left:right] for half in (first, second))
    kept = cut.clone()
    cut.copy_(other)
    other.copy_(kept)


def _on(device: torch.device, weights: np.ndarray) -> Tensor:
    return torch.from_numpy(weights).to(device, non_blocking=True)
