"""The settings of PyTorch FSDP2."""

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from scalevit.engines.settings import EngineSettings, Precision

if TYPE_CHECKING:
    from scalevit.engines.cost import EngineCost, ParameterLayout


class FsdpSettings(EngineSettings):
    """PyTorch FSDP2 (`fully_shard`)."""

    name: Literal["fsdp"] = "fsdp"
    shard_size: PositiveInt | None = None
    """Ranks that together hold one copy of the model, neighbours in rank; null: all of them. Fewer is HSDP, for example
    the GPUs of a node: each such group holds a copy, and only gradients cross between groups."""
    reshard_after_forward: bool = True
    """Free the gathered parameters of a block between its forward and its backward; false gathers once per step."""
    mixed_precision: Literal["autocast", "policy"] = "autocast"
    """autocast: gathers fp32, casts per operation, as DeepSpeed's engine does; policy: FSDP2's MixedPrecisionPolicy,
    gathers in train.precision (half the bytes), reduces in fp32, and LayerNorm and softmax compute in it too."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in the CPU's memory."""
    prefetch: PositiveInt | None = None
    """Blocks whose parameters are gathered ahead of the one that computes, forward and backward; null leaves it to
    FSDP2 (one ahead)."""

    @property
    def offloads(self) -> bool:
        """Whether parameters lie in the CPU's memory."""
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

    def cost(
        self, layout: "ParameterLayout", ranks: int, accumulation: int, *, optimizer_tensors: int, ema: bool
    ) -> "EngineCost":
        from scalevit.engines.fsdp.cost import fsdp_cost

        return fsdp_cost(self, layout, ranks, accumulation, optimizer_tensors=optimizer_tensors, ema=ema)

    def check_training(self, *, precision: Precision, meta_init: bool) -> None:
        if self.mixed_precision == "policy" and precision == "fp32":
            raise ValueError("engine.mixed_precision = policy needs train.precision = bf16 or fp16, not fp32")
