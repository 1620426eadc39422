"""Mixup and CutMix of a micro-batch on its device, by timm. The loss makes the targets from both labels.

Must not know files, orders or configs.
"""

from typing import NamedTuple

from timm.data import Mixup
from torch import Tensor

from scalevit.errors import SettingError


class MixedLabels(NamedTuple):
    """Labels of a batch after mixing: image j is `weight` of its own label and 1 - `weight` of its partner's."""

    labels: Tensor
    """(b,) int64."""
    partners: Tensor
    """(b,) int64; of no effect where nothing was mixed (weight 1)."""
    weight: float
    """Of the own label, 0 to 1; the same for all images of the batch."""


class BatchMixing:
    """Mixup and CutMix; row j mixes with row m-1-j. Draws from numpy's global generator.

    Args:
        mixup: alpha of mixup's Beta distribution; 0 turns it off.
        cutmix: alpha of CutMix; with both on, each batch takes one of the two.
        probability: that a batch is mixed at all.
    """

    def __init__(self, *, mixup: float, cutmix: float, probability: float) -> None:
        self._mixup: Mixup | None = None
        if probability and (mixup or cutmix):
            self._mixup = Mixup(mixup, cutmix, None, probability, 0.5, "batch", True)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, MixedLabels]:
        """Mixes images (m, 3, S, S) in place.

        Raises:
            SettingError: an odd micro-batch cannot be mixed.
        """
        if self._mixup is None:
            return images, MixedLabels(labels, labels, 1.0)
        if len(images) % 2:
            raise SettingError("micro_batch", len(images), "must be even for mixup and CutMix")
        weight = self._mixup._mix_batch(images)
        return images, MixedLabels(labels, labels.flip(0), weight)
