"""Cross-entropy with soft targets (timm's SoftTargetCrossEntropy, label smoothing as in timm's mixup_target)."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from scalevit.training.losses.base import Loss, soft_targets

if TYPE_CHECKING:
    from torch import Tensor

    from scalevit.data.transforms.mixing import MixedLabels


class CrossEntropyLoss(Loss):
    """Cross-entropy with label smoothing; mixed images have mixed targets."""

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the target that is spread over all classes (timm's default)."""

    def __call__(self, logits: "Tensor", labels: "MixedLabels") -> "Tensor":
        import torch.nn.functional as F

        targets = soft_targets(labels, logits.shape[1], self.label_smoothing)
        return F.cross_entropy(logits, targets, reduction="none")

    def check_classes(self, num_classes: int) -> None:
        if num_classes == 1 and self.label_smoothing:
            raise ValueError("model.num_classes = 1 cannot be combined with loss.label_smoothing")
