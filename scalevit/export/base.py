"""The seam of exporters: one form of file in which a trained model is written.

Knows models and settings. Must not know where the model comes from: `checkpoint_model` reads it. Like exporters it
imports no torch at module level, so that an unknown suffix is reported at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from scalevit.config.model import ModelConfig
from scalevit.models.reductions.base import Reduction

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelDescription:
    """What a model's tensors do not say."""

    model: ModelConfig
    reduction: Reduction
    """Applied already: the model is the reduced one."""
    tied: Mapping[str, str]
    """Further name -> canonical name of each shared parameter."""
    classes: Sequence[str] | None = None
    """Names of the classifier's outputs, if they are known."""


class Exporter(Protocol):
    """Writes a model as one file. `by_suffix` finds it in `EXPORTERS` by the suffix of the target."""

    @property
    def name(self) -> str:
        """The form of the file in a few words, for messages: "weights"."""

    @property
    def suffix(self) -> str:
        """Of the files that it writes, with the dot; no other exporter has it."""

    def write(self, model: "nn.Module", description: ModelDescription, target: Path) -> None:
        """Writes the file: complete or not at all.

        Args:
            model: on the CPU, in evaluation mode, with PyTorch's own modules for its MLPs.
            target: in a folder that exists.

        Raises:
            UserError: the file cannot be written, or its form cannot hold this model.
        """
