"""Classification: one forward pass, one loss."""

from typing import TYPE_CHECKING, Literal

from scalevit.training.tasks.base import DeviceBatch, Forward, Task, TaskLoss

if TYPE_CHECKING:
    import torch

    from scalevit.training.losses.base import Loss


class ClassificationTask(Task):
    """Images to classes."""

    name: Literal["classification"] = "classification"

    def build(self, loss: "Loss", device: "torch.device") -> "ClassificationRunner":
        return ClassificationRunner(loss)


class ClassificationRunner:
    """The loss of a micro-batch."""

    passes = 1

    def __init__(self, loss: "Loss"):
        self._loss = loss

    def loss(self, forward: Forward, batch: DeviceBatch, index: int) -> TaskLoss:
        # Losses are computed in fp32, also where the model runs in bf16 or fp16.
        return TaskLoss(self._loss.weighted_sum(forward(batch.images).float(), batch.labels, batch.weights))
