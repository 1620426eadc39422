"""Which order positions stand in which row of which micro-batch, and which micro-batches a rank takes.

An optimizer step has `global_batch` slots in K = global_batch / micro_batch micro-batches. What a micro-batch holds
depends on its number alone; the world size only says who computes it, so a run is the same at any world size that
divides K. Knows integers; must not know orders, files or tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scalevit.errors import UserError


class MicroBatch(NamedTuple):
    """What the rows of one micro-batch show."""

    step: int
    """Optimizer step."""
    number: int
    """k in 0..K-1."""
    positions: np.ndarray
    """(m,) int64 order positions, by row."""
    copies: np.ndarray
    """(m,) int64 in 0..repeats-1: which augmented copy of that position's sample, by row."""


@dataclass(frozen=True)
class Batching:
    """How positions are laid out in steps. With R = repeats, micro-batch k of step s holds the slots
    t = s * m + j, j = 0..m-1, of lane k: the position (t // R) * K + k in its copy t % R.
    """

    global_batch: int
    micro_batch: int
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.global_batch % self.micro_batch:
            raise UserError(
                f"train.global_batch = {self.global_batch} is not a multiple of train.micro_batch = {self.micro_batch}"
            )

    @property
    def count(self) -> int:
        """K, the micro-batches of a step over all ranks."""
        return self.global_batch // self.micro_batch

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and step.

        Raises:
            UserError: the ranks cannot share the step evenly; names settings that would fit.
        """
        if self.count % world_size == 0:
            return self.count // world_size
        unit = self.micro_batch * world_size
        fitting = f"train.global_batch = {max(1, round(self.global_batch / unit)) * unit}"
        if self.global_batch % world_size == 0:
            share = self.global_batch // world_size
            smaller = next(size for size in range(min(self.micro_batch, share), 0, -1) if share % size == 0)
            fitting += f" or train.micro_batch = {smaller}"
        raise UserError(
            f"train.global_batch = {self.global_batch} makes {self.count} micro-batches of train.micro_batch = "
            f"{self.micro_batch}, which {world_size} ranks cannot share evenly: use {fitting}"
        )

    def micro_batch_at(self, step: int, number: int) -> MicroBatch:
        """The rows of micro-batch `number` (0..K-1) of a step.

        The first half of the slots fills the rows from the top, the second half from the bottom. timm's mixup mixes
        row j with row m-1-j, so slots that mix lie half a micro-batch apart and, from micro_batch >= 2 * repeats on,
        are never copies of one image.
        """
        size, half = self.micro_batch, self.micro_batch // 2
        rows = np.arange(size)
        slots = step * size + np.where(rows < half, rows, size - 1 - rows + half)
        positions, copies = np.divmod(slots, self.repeats)
        return MicroBatch(step, number, positions * self.count + number, copies)

    def of_rank(self, rank: int, world_size: int, start_step: int) -> Iterator[MicroBatch]:
        """All micro-batches that a rank computes from a step on, endlessly: k = a * world_size + rank for
        a = 0..accumulation-1 in each step.

        Raises:
            UserError: as `accumulation`.
        """
        accumulation = self.accumulation(world_size)
        step = start_step
        while True:
            for index in range(accumulation):
                yield self.micro_batch_at(step, index * world_size + rank)
            step += 1


def spread_rank(rank: int, world_size: int, ranks_per_node: int) -> int:
    """The place in the order for a rank such that the ranks of a node read from the same lanes.

    Launchers number the ranks node by node. Rank and place are one to one, so a run's batches do not change.

    Args:
        rank: as the launcher numbers it.
        world_size: number of ranks.
        ranks_per_node: on every node; where it does not divide the world, the rank is its own place.
    """
    if world_size % ranks_per_node:
        return rank
    node, local = divmod(rank, ranks_per_node)
    return local * (world_size // ranks_per_node) + node
