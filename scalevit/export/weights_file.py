"""Weights as a safetensors file: each parameter once, by its canonical name, with the tied names in the metadata."""

from pathlib import Path
from typing import TYPE_CHECKING

from scalevit.export.base import ModelDescription

if TYPE_CHECKING:
    from torch import nn


class WeightsFile:
    """The file that `model.initial_weights` reads."""

    name = "weights"
    suffix = ".safetensors"

    def write(self, model: "nn.Module", description: ModelDescription, target: Path) -> None:
        """As `Exporter.write`."""
        from scalevit.models.weights.write import write_weights

        write_weights(
            target,
            dict(model.named_parameters()),
            model=description.model,
            reduction=description.reduction,
            tied=description.tied,
            classes=description.classes,
        )
