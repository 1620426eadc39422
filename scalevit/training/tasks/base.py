"""The seam of tasks: what is computed for a micro-batch. Must not import torch at module level."""

from scalevit.config.base import Part


class Task(Part):
    """What a run trains for; `name` names the kind. It owns the forward passes of a micro-batch and their loss."""

    name: str
