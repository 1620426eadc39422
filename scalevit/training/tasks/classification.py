"""Classification: one forward pass, one loss."""

from typing import Literal

from scalevit.training.tasks.base import Task


class ClassificationTask(Task):
    """Images to classes."""

    name: Literal["classification"] = "classification"
