"""The settings of PyTorch FSDP2."""

from typing import Literal

from pydantic import PositiveInt

from scalevit.engines.settings import EngineSettings, Precision


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

    def check_training(self, *, precision: Precision, meta_init: bool) -> None:
        if self.mixed_precision == "policy" and precision == "fp32":
            raise ValueError("engine.mixed_precision = policy needs train.precision = bf16 or fp16, not fp32")
