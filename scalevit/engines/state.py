"""A rank's part of a tensor, in the one form that every engine's layout has: a range of the flattened tensor.

ZeRO cuts flat buffers anywhere, FSDP2 cuts along the first dimension, and what is not sharded is whole on every rank:
all three are one contiguous range of the row-major elements. Checkpoints are written and read in this form.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + values.numel()` of a flattened tensor."""

    values: Tensor
    """One dimension; a view of what the engine works with, where that is in memory."""
    start: int
    shape: torch.Size
    """Of the whole tensor."""
    replica: int = 0
    """Which of the ranks that hold the same piece this is."""
    replicas: int = 1

    def share(self) -> "Piece":
        """The part of the piece that this rank writes, so that all holders of the same piece write as much."""
        numel = self.values.numel()
        begin, end = (numel * replica // self.replicas for replica in (self.replica, self.replica + 1))
        return Piece(self.values[begin:end], self.start + begin, self.shape)

    def empty_like(self) -> "Piece":
        """The same range, not filled, in fp32 on the CPU."""
        return replace(self, values=torch.empty(self.values.numel(), dtype=torch.float32))


@dataclass(frozen=True)
class Moments:
    """AdamW's state: the steps it has made, and this rank's pieces of both moments by parameter name."""

    steps: int
    exp_avg: Mapping[str, Piece]
    exp_avg_sq: Mapping[str, Piece]
