"""Weights as a file of ours: each parameter once, by its canonical name, with the tied names in the metadata."""

from pathlib import Path

from torch import nn

from scalevit.export.base import ModelDescription
from scalevit.models.weights.write import write_weights


def write_model(model: nn.Module, description: ModelDescription, target: Path) -> None:
    """Writes the file that `model.initial_weights` reads: complete or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_weights(
        target,
        dict(model.named_parameters()),
        model=description.model,
        reduction=description.reduction,
        tied=description.tied,
        classes=description.classes,
    )
