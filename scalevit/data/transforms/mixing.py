"""Mixup and CutMix on the device, in timm's modes, whose draws depend on rows of the global batch only.

Knows tensors and numbers of rows; must not know losses, ranks or micro-batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

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


@dataclass(frozen=True, kw_only=True)
class BatchMixing:
    """Mixup and CutMix; rows 2u and 2u + 1 of the global batch are mixed with each other.

    Each group of rows has one draw, as timm's `Mixup` has one for each batch of a loader, pair or element: whether it
    is mixed, by which of the two, the weight, and the rectangle.

    Raises:
        SettingError: `mixing_group` is odd.
    """

    mixup: float
    """Alpha of mixup's Beta distribution; 0 turns mixup off."""
    cutmix: float
    """Alpha of CutMix's Beta distribution; if both are on, each group uses one of them."""
    cutmix_minmax: tuple[float, float] | None = None
    """CutMix with rectangles whose sides are uniform between these shares of the image's, instead of by alpha."""
    probability: float = 1.0
    """That a group is mixed."""
    switch: float = 0.5
    """Probability of CutMix where both are on."""
    mode: Literal["batch", "pair", "elem"] = "batch"
    """What has one draw: `group` rows, two partners, or each row, which takes from its partner as it was before."""
    group: int = 256
    """Rows of the global batch that have one draw in mode batch; even."""
    until_step: int | None = None
    """The first step that is not mixed any more; None: all are."""
    unnormalised: bool = False
    """Whether the training step mixes before it normalises and erases, on rounded 8-bit values as timm's prefetcher
    does; otherwise after both."""
    seed: int = 0
    """Of the draws."""
    _generator: np.random.RandomState = field(
        default_factory=partial(np.random.RandomState, 0), init=False, repr=False, compare=False
    )
    """Seeded again for each draw, which takes a tenth of the time of making one. Its streams never change."""

    def __post_init__(self) -> None:
        if self.group % 2:
            raise SettingError("mixing_group", self.group, "must be even: rows are mixed in pairs")

    @property
    def _cutmix_alpha(self) -> float:
        return 1.0 if self.cutmix_minmax is not None else self.cutmix

    def mixes(self, step: int) -> bool:
        """Whether the rows of a step may be mixed."""
        over = self.until_step is not None and step >= self.until_step
        return bool(not over and self.probability and (self.mixup or self._cutmix_alpha))

    def draw(self, step: int, group: int, height: int, width: int) -> MixingDraw | None:
        """What a group of a step gets; None: it is not mixed. The distributions are those of timm's `Mixup`.

        Args:
            group: number of the group, pair or row in the global batch.
            height: of the images.
            width: of the images.
        """
        state = hash64(self.seed, int(Purpose.MIXING), step, group)
        generator = self._generator
        generator.seed([state & 0xFFFFFFFF, state >> 32])
        if generator.rand() >= self.probability:
            return None
        cuts = generator.rand() < self.switch if self.mixup and self._cutmix_alpha else not self.mixup
        alpha = self._cutmix_alpha if cuts else self.mixup
        weight = float(generator.beta(alpha, alpha))
        if not cuts:
            return MixingDraw(weight, None)
        box = self._box(weight, height, width)
        # timm's `correct_lam`: the weight is what the image really keeps.
        top, bottom, left, right = box
        return MixingDraw(1.0 - (bottom - top) * (right - left) / (height * width), box)

    def _box(self, weight: float, height: int, width: int) -> tuple[int, int, int, int]:
        """timm's `rand_bbox`, cut off at the border, or its `rand_bbox_minmax`, which lies inside."""
        generator = self._generator
        if self.cutmix_minmax is not None:
            low, high = self.cutmix_minmax
            h, w = (int(generator.randint(int(side * low), int(side * high))) for side in (height, width))
            top, left = (int(generator.randint(side - size + 1)) for side, size in ((height, h), (width, w)))
            return top, top + h, left, left + w
        ratio = math.sqrt(1 - weight)
        centers = generator.randint(height), generator.randint(width)
        (top, bottom), (left, right) = (
            (max(center - int(side * ratio) // 2, 0), min(center + (int(side * ratio) + 1) // 2, side))
            for center, side in zip(centers, (height, width), strict=True)
        )
        return top, bottom, left, right

    def __call__(self, images: Tensor, labels: Tensor, *, step: int, rows: np.ndarray) -> tuple[Tensor, MixedLabels]:
        """Mixes images; float images in place.

        Args:
            images: (m, 3, S, S) float32 or uint8, rows with their partners. Mixed values of uint8 are rounded.
            labels: (m,) int64.
            step: number of the optimizer step.
            rows: (m,) int64, numbers in the global batch, ascending from an even one; padding is negative and last.
        """
        weights = np.ones(len(rows))
        if not self.mixes(step):
            return images, MixedLabels(labels, labels, _on(labels.device, weights))
        if images.dtype == torch.uint8:
            images = images.clone()  # they may be a loader's own
        paired = (rows >= 0).sum() // 2 * 2  # the last row of an odd global batch has no partner
        if self.mode == "batch":
            groups, starts, counts = np.unique(rows[:paired] // self.group, return_index=True, return_counts=True)
            for group, start, end in zip(groups.tolist(), starts, starts + counts, strict=True):
                drawn = self.draw(step, group, *images.shape[2:])
                if drawn is not None:
                    _mix_pairs(images[start:end], drawn)
                    weights[start:end] = drawn.weight
        else:
            numbers = rows[:paired] if self.mode == "elem" else rows[:paired:2] // 2
            draws = [self.draw(step, number, *images.shape[2:]) for number in numbers.tolist()]
            draws = draws if self.mode == "elem" else [drawn for drawn in draws for _ in range(2)]
            _mix_rows(images[:paired], draws)
            weights[:paired] = [1.0 if drawn is None else drawn.weight for drawn in draws]
        partners = labels.clone()
        partners[:paired] = labels[:paired].view(-1, 2).flip(1).flatten()
        return images, MixedLabels(labels, partners, _on(labels.device, weights))


def _mix_pairs(images: Tensor, drawn: MixingDraw) -> None:
    """The same mixing for all. images: (2n, 3, S, S), changed in place."""
    first, second = images[0::2], images[1::2]
    if drawn.box is not None:
        top, bottom, left, right = drawn.box
        cut, other = (half[:, :, top:bottom, left:right] for half in (first, second))
        kept = cut.clone()
        cut.copy_(other)
        other.copy_(kept)
    elif images.dtype == torch.uint8:
        halves = first.float(), second.float()
        for target, own, partner in ((first, *halves), (second, *halves[::-1])):
            target.copy_(torch.round(own * drawn.weight + partner * (1.0 - drawn.weight)))
    else:
        kept = first.clone()
        first.mul_(drawn.weight).add_(second, alpha=1.0 - drawn.weight)
        second.mul_(drawn.weight).add_(kept, alpha=1.0 - drawn.weight)


def _mix_rows(images: Tensor, draws: Sequence[MixingDraw | None]) -> None:
    """A mixing for each row. images: (2n, 3, S, S), changed in place; 2n draws."""
    # Of each row: the rectangle that comes from the partner, and the share of the own pixels outside of it.
    table = [(*(drawn.box or (0, 0, 0, 0)), 1.0 if drawn.box else drawn.weight) if drawn else (0, 0, 0, 0, 1.0)
             for drawn in draws]  # fmt: skip
    top, bottom, left, right, share = (
        torch.tensor(table, dtype=torch.float32).to(images.device).T[:, :, None, None, None]
    )
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = (y[:, None] >= top) & (y[:, None] < bottom) & (x >= left) & (x < right)
    own = torch.where(inside, 0.0, share)
    partners = images.view(-1, 2, *images.shape[1:]).flip(1).flatten(0, 1)
    mixed = images * own + partners * (1.0 - own)
    images.copy_(torch.round(mixed) if images.dtype == torch.uint8 else mixed)


def _on(device: torch.device, weights: np.ndarray) -> Tensor:
    return torch.from_numpy(weights).to(device, non_blocking=True)
