"""Cross-entropy with a Jensen-Shannon divergence between views of an image (timm's JsdCrossEntropy, AugMix)."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from scalevit.config.base import NonNegativeFloat
from scalevit.training.losses.base import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from scalevit.data.transforms.mixing import MixedLabels


class JsdLoss(Loss):
    """Cross-entropy of the clean view, and the divergence of all views' predictions (AugMix, arXiv:1912.02781). Needs
    several views of each image (augmentation splits)."""

    name: Literal["jsd"] = "jsd"
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the target that is spread over all classes (timm's default)."""
    alpha: NonNegativeFloat = 12.0
    """Weight of the divergence (timm's default)."""

    def __call__(self, logits: "Tensor", labels: "MixedLabels") -> "Tensor":
        """logits (views * b, classes) float32, the first views of all rows first -> the loss of each row (b,)."""
        import torch.nn.functional as F

        # timm's loss is a mean over rows; here each row has its own, so that padding has none.
        views = logits.unflatten(0, (labels.views, -1))
        clean = labels.labels[: views.shape[1]]
        loss = F.cross_entropy(views[0], clean, reduction="none", label_smoothing=self.label_smoothing)
        probabilities = views.softmax(-1)
        log_mixture = probabilities.mean(0).clamp(1e-7, 1).log()
        divergence = F.kl_div(log_mixture.expand_as(views), probabilities, reduction="none").sum(-1).mean(0)
        return loss + self.alpha * divergence

    def weighted_sum(self, logits: "Tensor", labels: "MixedLabels", weights: "Tensor") -> "Tensor":
        return (self(logits, labels) * weights.view(labels.views, -1).sum(0)).sum()

    def check_views(self, views: int) -> None:
        if views < 2:
            raise ValueError(f"loss.name = jsd compares views: data.augmentation.splits = {views} must be at least 2")
