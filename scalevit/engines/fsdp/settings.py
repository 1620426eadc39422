"""The settings of PyTorch FSDP2."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from scalevit.config.base import ClipMode, Precision
from scalevit.engines.settings import EngineSettings, UpdateScope
from scalevit.errors import SettingError

if TYPE_CHECKING:
    from torch import nn

    from scalevit.distributed import World
    from scalevit.engines.base import Engine, EngineSpec
    from scalevit.engines.cost import EngineCost, ParameterLayout, Workload


class FsdpSettings(EngineSettings):
    """PyTorch FSDP2 (`fully_shard`)."""

    name: Literal["fsdp"] = "fsdp"
    shard_size: PositiveInt | None = None
    """Number of ranks, neighbours in rank, that together hold one copy of the model; null: all ranks. Fewer is HSDP,
    for example the GPUs of a node: each such group holds a copy, and only gradients cross between groups."""
    reshard_after_forward: bool = True
    """Free the gathered parameters of a block between its forward and its backward; false gathers once per step."""
    mixed_precision: Literal["autocast", "policy"] = "autocast"
    """autocast: gathers fp32, casts per operation, as DeepSpeed's engine does; policy: FSDP2's MixedPrecisionPolicy,
    gathers in train.precision (half the bytes), reduces in fp32; LayerNorm and softmax also compute in it."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in the CPU's memory."""
    prefetch: PositiveInt | None = None
    """Number of blocks whose parameters are gathered ahead of the one that computes, forward and backward; null:
    FSDP2's default (one ahead)."""

    @property
    def offloads(self) -> bool:
        """Whether parameters are kept in the CPU's memory."""
        return self.cpu_offload

    @property
    def label(self) -> str:
        return "FSDP2" if self.shard_size is None else f"HSDP, {self.shard_size} shards"

    @property
    def overlaps_communication(self) -> bool:
        return True

    @property
    def not_estimated(self) -> list[str]:
        ignored = [name for name in ("cpu_offload", "prefetch") if getattr(self, name)]
        return [*ignored, *(["mixed_precision"] if self.mixed_precision == "policy" else [])]

    def cost(self, layout: "ParameterLayout", workload: "Workload") -> "EngineCost":
        from scalevit.engines.fsdp.cost import fsdp_cost

        return fsdp_cost(self, layout, workload)

    def check_training(self, *, precision: Precision, meta_init: bool) -> None:
        if self.mixed_precision == "policy" and precision == "fp32":
            raise ValueError("engine.mixed_precision = policy needs train.precision = bf16 or fp16, not fp32")

    def check(self, world: "World") -> None:
        if self.shard_size is not None and world.size % self.shard_size:
            raise SettingError("shard_size", self.shard_size, f"does not divide the {world.size} ranks of this run")

    def update_scope(self, world: "World") -> UpdateScope:
        # Shards are DTensors, whose norms and means are reduced over ranks; what is not sharded is whole.
        return "matrices" if (self.shard_size or world.size) == 1 else "tensors"

    @property
    def clip_modes(self) -> Sequence[ClipMode]:
        return ("norm", "value", "agc")

    def build(self, module: "nn.Module", spec: "EngineSpec") -> "Engine":
        from scalevit.engines.fsdp.engine import FsdpEngine

        return FsdpEngine(module, spec, self)
