"""Tasks, one file each. A new one is its file and one line here."""

from scalevit.training.tasks.classification import ClassificationTask
from scalevit.training.tasks.distillation.task import DistillationTask
from scalevit.training.tasks.nested_width import NestedWidthTask

TASKS = (ClassificationTask, DistillationTask, NestedWidthTask)
