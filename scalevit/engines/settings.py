"""The seam of engines: settings that check themselves and build an engine. Must not import torch at module level."""

from typing import TYPE_CHECKING, Literal

from scalevit.config.base import Part

if TYPE_CHECKING:
    from torch import nn

    from scalevit.distributed import World
    from scalevit.engines.base import Engine, EngineSpec

PrecisionName = Literal["bf16", "fp16", "fp32"]
UpdateScope = Literal["elements", "tensors", "matrices"]
"""What one update of an optimizer reads: single elements (AdamW, SGD, Lion); a parameter's norm or mean too (LAMB,
LARS), which must be computed over all of its shards; or whole matrices (Muon, Adafactor)."""
UPDATE_SCOPES: tuple[UpdateScope, ...] = ("elements", "tensors", "matrices")


class EngineSettings(Part):
    """How a model is sharded over ranks and stepped; `name` selects the engine."""

    name: str

    @property
    def offloads(self) -> bool:
        """Whether parameters are kept in the CPU's memory."""
        return False

    def check_training(self, *, precision: PrecisionName, meta_init: bool) -> None:
        """Finds combinations with `train` that this engine cannot run.

        Raises:
            ValueError: the combination, with the config keys.
        """

    def check(self, world: "World") -> None:
        """Finds what cannot work on this machine or with this number of ranks. Needs no process group.

        Raises:
            UserError: in one line, what does not work and what would.
        """

    def update_scope(self, world: "World") -> UpdateScope:
        """The widest scope of optimizers that compute the same on this engine and world size as in one process."""
        raise NotImplementedError

    def build(self, module: "nn.Module", spec: "EngineSpec") -> "Engine":
        """The engine around a module, which it takes over. Collective."""
        raise NotImplementedError
