"""The seam of engines: settings that check themselves and build an engine. Must not import torch at module level."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from scalevit.config.base import ClipMode, Part, Precision

if TYPE_CHECKING:
    from torch import nn

    from scalevit.distributed import World
    from scalevit.engines.base import Engine, EngineSpec
    from scalevit.engines.cost import EngineCost, ParameterLayout, Workload

UpdateScope = Literal["elements", "tensors", "matrices"]
"""What one update of an optimizer reads: single elements (AdamW, SGD, Lion); a parameter's norm or mean too (LAMB,
LARS), which must be computed over all of its shards; or whole matrices (Muon, Adafactor)."""
_CLIPPING_NEEDS: dict[ClipMode, str] = {
    "norm": "the global norm",
    "value": "the gradient as the optimizer steps it",
    "agc": "whole rows of the gradient (ZeRO stage 0 or FSDP2)",
}
UPDATE_SCOPES: tuple[UpdateScope, ...] = ("elements", "tensors", "matrices")


class EngineSettings(Part):
    """How a model is sharded over ranks and stepped; `name` selects the engine."""

    name: str

    @property
    def offloads(self) -> bool:
        """Whether parameters are kept in the CPU's memory."""
        return False

    @property
    def label(self) -> str:
        """The name in tables, with what tells this kind of sharding from others of the engine, e.g. "ZeRO 1"."""
        raise NotImplementedError

    @property
    def overlaps_communication(self) -> bool:
        """Whether communication runs at the same time as computation."""
        raise NotImplementedError

    @property
    def not_estimated(self) -> list[str]:
        """Names of the settings in use whose effect `cost` leaves out; it returns the cost without them."""
        return []

    def variants(self) -> Sequence["EngineSettings"]:
        """Every kind of sharding that this engine offers, for comparison, with these settings wherever they apply."""
        return [self]

    def cost(self, layout: "ParameterLayout", workload: "Workload") -> "EngineCost":
        """Estimates what one rank holds and what one optimizer step sends.

        Args:
            layout: the model's parameters; the meta device is enough.
        """
        raise NotImplementedError

    def check_training(self, *, precision: Precision, meta_init: bool) -> None:
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

    @property
    def clip_modes(self) -> Sequence[ClipMode]:
        """The ways in which gradients can be clipped."""
        return ("norm",)

    def clip_refusal(self, mode: ClipMode) -> str | None:
        """Why gradients cannot be clipped in this way, or None if they can."""
        if mode in self.clip_modes:
            return None
        needs = _CLIPPING_NEEDS[mode]
        return f"needs {needs}, which {self.label} does not have; it clips by {' or '.join(self.clip_modes)}"

    def build(self, module: "nn.Module", spec: "EngineSpec") -> "Engine":
        """The engine around a module, which it takes over. Collective."""
        raise NotImplementedError
