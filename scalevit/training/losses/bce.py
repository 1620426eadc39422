"""Binary cross-entropy over classes (timm's BinaryCrossEntropy), as in "ResNet strikes back" (arXiv:2110.00476)."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from scalevit.config.base import UnitInterval
from scalevit.training.losses.base import Loss, soft_targets

if TYPE_CHECKING:
    from torch import Tensor

    from scalevit.data.transforms.mixing import MixedLabels


class BinaryCrossEntropyLoss(Loss):
    """Binary cross-entropy: each class is a yes-or-no question of its own."""

    name: Literal["bce"] = "bce"
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the target that is spread over all classes, before the threshold (timm's default)."""
    target_threshold: UnitInterval | None = None
    """Targets above it become 1, all others 0, so that a mixed image has two whole labels; null keeps soft targets."""

    sum_classes: bool = False
    """Sum over the classes instead of their mean."""
    positive_weight: PositiveFloat | None = None
    """Factor on the loss of classes whose target is 1; null: 1."""

    def __call__(self, logits: "Tensor", labels: "MixedLabels") -> "Tensor":
        from timm.loss import BinaryCrossEntropy

        weight = None if self.positive_weight is None else logits.new_full((), self.positive_weight)
        criterion = BinaryCrossEntropy(target_threshold=self.target_threshold, pos_weight=weight, reduction="none")
        of_classes = criterion(logits, soft_targets(labels, logits.shape[1], self.label_smoothing))
        return of_classes.sum(1) if self.sum_classes else of_classes.mean(1)
