"""The seam of losses. Knows settings and tensors; must not import torch at module level."""

from typing import TYPE_CHECKING

from scalevit.config.base import Part

if TYPE_CHECKING:
    from torch import Tensor

    from scalevit.data.transforms.mixing import MixedLabels


class Loss(Part):
    """A training loss; `name` names the kind. It makes its targets from labels, so smoothing and thresholds are its
    own settings."""

    name: str

    def __call__(self, logits: "Tensor", labels: "MixedLabels") -> "Tensor":
        """logits (b, classes) float32 -> the loss of each image (b,).

        Raises:
            NotImplementedError: by this base class.
        """
        raise NotImplementedError

    def check_classes(self, num_classes: int) -> None:
        """Finds settings that do not fit a number of classes.

        Raises:
            ValueError: what does not fit, with the config keys.
        """
