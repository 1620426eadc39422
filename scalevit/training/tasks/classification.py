"""Classification: one forward pass, one loss."""

from typing import TYPE_CHECKING, Literal

from scalevit.training.tasks.base import DeviceBatch, Forward, Task, TaskLoss, TaskRunner

if TYPE_CHECKING:
    from scalevit.config.tree import Config
    from scalevit.distributed import World
    from scalevit.training.losses.base import Loss


class ClassificationTask(Task):
    """Images to classes."""

    name: Literal["classification"] = "classification"

    def build(self, config: "Config", world: "World") -> "ClassificationRunner":
        return ClassificationRunner(config.loss)


class ClassificationRunner(TaskRunner):
    """The loss of a micro-batch."""

    def __init__(self, loss: "Loss"):
        self._loss = loss

    def loss(self, forward: Forward, batch: DeviceBatch, index: int) -> TaskLoss:
        # Losses are computed in fp32, also where the model runs in bf16 or fp16.
        return TaskLoss(self._loss.weighted_sum(forward(batch.images).float(), batch.labels, batch.weights))
