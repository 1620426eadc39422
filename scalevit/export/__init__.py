"""Exports: a checkpoint's model as one file for other tools, and whole runs to and from DeepSpeed's checkpoints.

Knows checkpoints, and models and engines through their seams; must not know the trainer's inside. A new exporter is its
file and one line here.
"""

from scalevit.export.base import Exporter
from scalevit.export.weights_file import WeightsFile

EXPORTERS: tuple[Exporter, ...] = (WeightsFile(),)
