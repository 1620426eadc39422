"""What an engine costs: bytes that a rank holds, and bytes that it sends in a step. The terms that all engines share.

The formulas are beside each engine (`engines/*/cost.py`). Knows parameters, their blocks and sizes; must not know
models, devices or process groups. `tests/planning` compares the formulas with real ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from scalevit.tying import group_by_shared_parameters

FP32_BYTES = 4
"""Bytes of an element of the weights, gradients and optimizer state of an fp32 model."""


@dataclass(frozen=True)
class ParameterLayout:
    """A module's parameters as engines group them; each parameter is counted once."""

    root: list[nn.Parameter]
    """Those outside of all blocks."""
    units: list[list[nn.Parameter]]
    """Those of each block; blocks that share parameters form one unit."""
    reused: list[nn.Parameter]
    """Shared parameters, once for each block that uses them after the first."""

    @classmethod
    def of(cls, module: nn.Module, blocks: Sequence[nn.Module]) -> "ParameterLayout":
        """The layout of a module (the meta device is enough) whose units of sharding are these blocks."""
        units = [
            list(dict.fromkeys(parameter for block in group for parameter in block.parameters()))
            for group in group_by_shared_parameters(blocks)
        ]
        seen: set[nn.Parameter] = set()
        reused: list[nn.Parameter] = []
        for block in blocks:
            own = list(block.parameters())
            reused += [parameter for parameter in own if parameter in seen]
            seen.update(own)
        return cls([parameter for parameter in module.parameters() if parameter not in seen], units, reused)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return [parameter for unit in [self.root, *self.units] for parameter in unit]

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those that need a gradient."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]


@dataclass(frozen=True)
class Workload:
    """What a cost depends on beside an engine's settings and the model."""

    ranks: int
    """Of the whole run; `shard_size`-like settings divide them."""
    accumulation: int
    """Micro-batches per rank and step."""
    optimizer_tensors: int
    """State tensors of the parameter's shape that the optimizer keeps, e.g. 2 for AdamW."""
    ema: bool
    """Whether an fp32 copy of the rank's local weights is held."""
    weight_bytes: int = FP32_BYTES
    """Of an element of the weights, the optimizer's state and the gradients that it reads."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one rank during training, activations not included."""

    weights: int
    """The module's own, whole or sharded."""
    optimizer: int
    """State tensors of the optimizer, and the fp32 copy of the weights that ZeRO 1 to 3 update."""
    gradients: int
    """The averaged gradients that the optimizer reads. They replace the activations in the course of the backward."""
    ema: int
    backward_buffers: int
    """Upper bound beside the activations: gathered parameters, gradients not yet averaged, buckets."""
    step_buffers: int
    """Upper bound between backward and optimizer step, when the activations are freed."""

    def peak(self, activations: float) -> float:
        """Upper bound over a whole step.

        Args:
            activations: bytes at the peak of one micro-batch's forward and backward.
        """
        state = self.weights + self.optimizer + self.ema
        return state + max(activations + self.backward_buffers, self.gradients + self.step_buffers)


@dataclass(frozen=True)
class Traffic:
    """Payload bytes of one optimizer step's collectives: the full size of the tensors, not one rank's share."""

    all_reduce: int = 0
    reduce_scatter: int = 0
    all_gather: int = 0
    shards: int | None = None
    """Size of the groups of ranks that hold one copy of the model (HSDP). Reduce-scatter and all-gather run within
    such a group, all-reduce between groups. None: every collective runs over all ranks."""

    @property
    def gradients(self) -> int:
        """Of the collectives that reduce gradients."""
        return self.all_reduce + self.reduce_scatter

    def bytes_sent(self, ranks: int) -> float:
        """Bytes that each rank sends with ring algorithms (Patarasuk and Yuan 2009)."""
        return self.replica_bytes(ranks) + self.shard_bytes(ranks)

    def replica_bytes(self, ranks: int) -> float:
        """The part of `bytes_sent` that goes between copies of the model, or over all ranks: the all-reduces."""
        return _ring_share(ranks if self.shards is None else ranks // self.shards) * 2 * self.all_reduce

    def shard_bytes(self, ranks: int) -> float:
        """The part of `bytes_sent` that goes between the shards of a copy: reduce-scatters and all-gathers."""
        return _ring_share(self.shards or ranks) * (self.reduce_scatter + self.all_gather)


@dataclass(frozen=True)
class EngineCost:
    """What one engine needs for one model."""

    memory: MemoryUse
    traffic: Traffic
    updated_bytes: int
    """Size of the weights that this rank's optimizer updates, which is the size of each of its state tensors."""


def parameter_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Their size in fp32."""
    return sum(FP32_BYTES * parameter.numel() for parameter in parameters)


def _ring_share(ranks: int) -> float:
    """The share of a buffer that each rank sends in a reduce-scatter or an all-gather."""
    return (ranks - 1) / ranks
