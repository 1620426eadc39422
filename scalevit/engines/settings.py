"""The seam of engines' settings. Knows settings; must not import torch at module level."""

from typing import Literal

from scalevit.config.base import Part

Precision = Literal["bf16", "fp16", "fp32"]


class EngineSettings(Part):
    """How a model is sharded over ranks and stepped; `name` names the engine."""

    name: str

    @property
    def offloads(self) -> bool:
        """Whether parameters are kept in the CPU's memory."""
        return False

    def check_training(self, *, precision: Precision, meta_init: bool) -> None:
        """Finds combinations with `train` that this engine cannot run.

        Raises:
            ValueError: what does not fit, with the config keys.
        """
