"""The seam of tasks: what is computed for a micro-batch. Must not import torch at module level."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from scalevit.config.base import Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from scalevit.data.transforms.mixing import MixedLabels
    from scalevit.training.losses.base import Loss

Forward = Callable[["Tensor"], "Tensor"]
"""images (b, 3, S, S) -> logits (b, classes): the engine's model."""


class DeviceBatch(NamedTuple):
    """A micro-batch on its device, after normalisation, erasing and mixing."""

    images: "Tensor"
    """(b, 3, S, S) float32."""
    labels: "MixedLabels"
    weights: "Tensor"
    """(b,) float32: 1 for an image, 0 for a row that only fills up the batch."""


class TaskLoss(NamedTuple):
    """The loss of one forward pass."""

    total: "Tensor"
    """Scalar, the sum over the images of the micro-batch, each times its weight; what is differentiated. The training
    step divides it by the images of the global batch."""
    parts: "Mapping[str, Tensor]" = {}
    """Likewise sums, that are logged as `loss_NAME`, for example the terms of `total`."""


class TaskRunner(Protocol):
    """A task that is ready to run."""

    passes: int
    """Forward and backward passes of a micro-batch. Their gradients, and their losses in the log, are added up."""

    def loss(self, forward: Forward, batch: DeviceBatch, index: int) -> TaskLoss:
        """One forward pass and its loss.

        Args:
            forward: the model.
            batch: the micro-batch, the same one in every pass.
            index: number of the pass, 0 to `passes` - 1.
        """


class Task(Part):
    """What a run trains for; `name` names the kind. It owns the forward passes of a micro-batch and their loss."""

    name: str

    def check(self) -> None:
        """Finds settings that cannot work. Called before any process group exists; must not download anything.

        Raises:
            SettingError: a setting, by the name of its field.
        """

    def build(self, loss: "Loss", device: "torch.device") -> TaskRunner:
        """Loads what the task needs besides the model.

        Args:
            loss: of logits and labels.
            device: of the batches.

        Raises:
            NotImplementedError: by this base class.
        """
        raise NotImplementedError
