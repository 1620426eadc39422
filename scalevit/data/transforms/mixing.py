"""Mixup and CutMix of a micro-batch on its device.

Mixing returns both labels of each image and their weight; the loss makes its targets from them, so nothing here knows
label smoothing or the number of classes. Knows timm and tensors; must not know files, orders or losses.
"""

from typing import NamedTuple

from timm.data import Mixup
from torch import Tensor

from scalevit.errors import SettingError


class MixedLabels(NamedTuple):
    """Labels of a micro-batch after mixing: each image is `weight` of its own label and 1 - `weight` of its partner's.

    timm's targets are weight * one_hot(labels) + (1 - weight) * one_hot(partners), where label smoothing changes both
    one-hot vectors in the same way: smoothing / classes everywhere, and 1 - smoothing + smoothing / classes at the
    label. The sums are computed in float32, with `weight` and 1 - `weight` each rounded from float64.
    """

    labels: Tensor
    """(m,) int64."""
    partners: Tensor
    """(m,) int64, the labels of the images that were mixed in."""
    weight: float
    """Weight of the own label, 0 to 1, the same for all images; 1 if nothing was mixed. In double precision."""


class BatchMixing:
    """Mixup and CutMix of a micro-batch; row j is mixed with row m-1-j.

    Draws from numpy's global generator: the training loop seeds it for each micro-batch.

    Args:
        mixup: alpha of mixup's Beta distribution; 0 turns mixup off.
        cutmix: alpha of CutMix's Beta distribution; if both are on, each micro-batch uses one of them.
        probability: that a micro-batch is mixed.
    """

    def __init__(self, *, mixup: float, cutmix: float, probability: float) -> None:
        self._mixup: Mixup | None = None
        if probability and (mixup or cutmix):
            self._mixup = Mixup(mixup, cutmix, prob=probability, switch_prob=0.5, mode="batch", correct_lam=True)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, MixedLabels]:
        """Mixes images in place.

        Args:
            images: (m, 3, S, S) float32.
            labels: (m,) int64.

        Raises:
            SettingError: `micro_batch`: an odd number of images cannot be mixed.
        """
        if self._mixup is None:
            return images, MixedLabels(labels, labels, 1.0)
        if len(images) % 2:
            raise SettingError("micro_batch", len(images), "must be even for mixup and CutMix")
        # A private method: timm's public call returns targets, from which the weight cannot be recovered exactly.
        weight = self._mixup._mix_batch(images)
        return images, MixedLabels(labels, labels.flip(0), float(weight))
