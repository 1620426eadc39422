"""The seam of losses. Knows settings and tensors; must not import torch at module level."""

from typing import TYPE_CHECKING

from scalevit.config.base import Part

if TYPE_CHECKING:
    from torch import Tensor

    from scalevit.data.transforms.mixing import MixedLabels


class Loss(Part):
    """A training loss. It makes its targets from labels, so label smoothing and thresholds are its own settings."""

    name: str

    def __call__(self, logits: "Tensor", labels: "MixedLabels") -> "Tensor":
        """logits (b, classes) float32 -> the loss of each image (b,).

        Raises:
            NotImplementedError: by this base class.
        """
        raise NotImplementedError

    def weighted_sum(self, logits: "Tensor", labels: "MixedLabels", weights: "Tensor") -> "Tensor":
        """The images' losses times their weights (b,), summed; a scalar. Padding has weight 0, an image 1."""
        return (self(logits, labels) * weights).sum()

    def check_classes(self, num_classes: int) -> None:
        """Finds settings that do not fit a number of classes.

        Raises:
            ValueError: what does not fit, with the config keys.
        """

    def check_views(self, views: int) -> None:
        """Finds a loss that does not fit the number of views of each image.

        Args:
            views: `data.augmentation.splits`; 0 for the image itself.

        Raises:
            ValueError: what does not fit, with the config keys.
        """


def soft_targets(labels: "MixedLabels", num_classes: int, smoothing: float) -> "Tensor":
    """(b, num_classes) float32, as timm's `mixup_target` makes them: smoothed one-hot vectors of both labels, weighted.

    Args:
        labels: (b,), on any device.
        num_classes: width of the targets.
        smoothing: share of each target that is spread over all classes.
    """
    from timm.data.mixup import mixup_target

    own, partner = (mixup_target(of, num_classes, smoothing=smoothing) for of in (labels.labels, labels.partners))
    weight = labels.weight[:, None]
    return own * weight.float() + partner * (1.0 - weight).float()
