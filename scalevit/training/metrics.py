"""Metrics of an evaluation, by name, computed for each image so that they can be averaged over any split of the set."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """What a model says of a batch."""

    logits: Tensor
    """(b, classes) float32."""
    labels: Tensor
    """(b,) int64."""
    decoded: Tensor
    """(b,) bool; an image that cannot be decoded counts as wrong, with the loss of a blank one."""

    real_labels: Tensor | None = None
    """(b, L) int64, filled up with -1: all labels that are right (ReaL, arXiv:2006.07159)."""

    @cached_property
    def ranked(self) -> Tensor:
        """(b, 5) class indices by descending logit; fewer columns where there are fewer classes."""
        return self.logits.topk(min(5, self.logits.shape[1]), dim=1).indices

    def hits(self, k: int) -> Tensor:
        """(b,) bool: whether the label is among the first k <= 5 classes. With fewer classes, among all."""
        return (self.ranked[:, :k] == self.labels[:, None]).any(1) & self.decoded

    def real_hits(self, k: int) -> Tensor:
        """(b,) bool: whether one of the first k <= 5 classes is among the real labels."""
        assert self.real_labels is not None
        return (self.ranked[:, :k, None] == self.real_labels[:, None, :]).flatten(1).any(1) & self.decoded


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation: the mean over images, times `scale`."""

    of_images: Callable[[Predictions], Tensor]
    """-> (b,)."""
    scale: float = 1.0
    """100 for percentages."""
    counts: Callable[[Predictions], Tensor] | None = None
    """-> (b,) bool, the images that the mean is over; None: all."""


METRICS = {
    "top1": Metric(lambda predictions: predictions.hits(1), scale=100.0),
    "top5": Metric(lambda predictions: predictions.hits(5), scale=100.0),
    "loss": Metric(lambda predictions: F.cross_entropy(predictions.logits, predictions.labels, reduction="none")),
}
"""By the name that they have in records."""


def _has_real_labels(predictions: Predictions) -> Tensor:
    assert predictions.real_labels is not None
    return (predictions.real_labels >= 0).any(1)


_REAL_METRICS = {
    "real_top1": Metric(lambda predictions: predictions.real_hits(1), scale=100.0, counts=_has_real_labels),
    "real_top5": Metric(lambda predictions: predictions.real_hits(5), scale=100.0, counts=_has_real_labels),
}


def metrics_of(*, real_labels: bool) -> Mapping[str, Metric]:
    """What an evaluation measures.

    Args:
        real_labels: whether the images have such labels.
    """
    return {**METRICS, **_REAL_METRICS} if real_labels else METRICS
