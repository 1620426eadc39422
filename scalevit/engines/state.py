"""What leaves and enters an engine, in the one form that every engine's layout has. Knows tensors, no engine.

ZeRO cuts flat buffers anywhere, FSDP2 cuts along the first dimension, and what is not sharded is whole on every rank:
all three are one contiguous range of the row-major elements, a `TensorSlice`. Checkpoints are written and read in this
form, and the optimizer's state travels in it from one engine to another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Scalar = bool | int | float | Tensor
"""A number, or a tensor without dimensions on the CPU: optimizers tell the two apart."""


@dataclass(frozen=True)
class TensorSlice:
    """Elements `start` to `start + values.numel()` of a flattened tensor."""

    values: Tensor
    """One dimension; a view of what the engine works with, where that is in memory."""
    start: int
    shape: torch.Size
    """Of the whole tensor."""
    replica: int = 0
    """Index of this rank among those that hold the same slice."""
    replicas: int = 1

    def written_part(self) -> "TensorSlice":
        """The part of the slice that this rank writes: ranks that hold the same slice write equal parts of it."""
        numel = self.values.numel()
        begin, end = (numel * replica // self.replicas for replica in (self.replica, self.replica + 1))
        return TensorSlice(self.values[begin:end], self.start + begin, self.shape)

    def empty_like(self, dtype: torch.dtype = torch.float32) -> "TensorSlice":
        """The same range on the CPU, uninitialised."""
        return replace(self, values=torch.empty(self.values.numel(), dtype=dtype))


@dataclass(frozen=True)
class StateTensor:
    """One tensor that an optimizer keeps for parameters, e.g. `exp_avg`; the same on every rank."""

    dtype: torch.dtype
    shapes: Mapping[str, torch.Size]
    """By the name of each parameter that has it; usually the parameter's own shape."""


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps between steps. Empty before the first step.

    Scalars are what it keeps as numbers or as tensors without dimensions (`step`, NAdam's `mu_product`), by name and
    parameter. Numbers that an optimizer counts in its parameter groups (Adan's and LAMB's step) are among them, under
    names that begin with `GROUP`, with the same value for each parameter of the group.
    """

    optimizer: str = ""
    """The class of the optimizer, e.g. AdamW: no other can resume from the state."""
    tensors: Mapping[str, Mapping[str, TensorSlice]] = field(default_factory=dict)
    """This rank's slices by tensor name and parameter name. Each rank names every parameter that has the tensor; where
    it holds no element of one, its slice is empty."""
    scalars: Mapping[str, Mapping[str, Scalar]] = field(default_factory=dict)
    """By scalar name and parameter name; the same on every rank."""

    GROUP = "group."

    @property
    def is_empty(self) -> bool:
        return not self.tensors and not self.scalars

    def describe(self) -> dict[str, StateTensor]:
        """Which tensors there are, by name: what `Engine.optimizer_state_layout` needs to know."""
        return {
            name: StateTensor(next(iter(slices.values())).values.dtype, {n: s.shape for n, s in slices.items()})
            for name, slices in self.tensors.items()
        }
