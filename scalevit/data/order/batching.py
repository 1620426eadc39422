"""The layout of steps: which order positions are in which micro-batch, which rank computes it, where epochs end.

An optimizer step has `global_batch` slots in K = global_batch / micro_batch micro-batches. The content of a micro-batch
depends on its number only; the world size decides who computes it, so a run is the same at any world size that divides
K. Knows integers; must not know orders, files or tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scalevit.errors import SettingError


class MicroBatch(NamedTuple):
    """The rows of one micro-batch."""

    step: int
    """Optimizer step."""
    number: int
    """k in 0..K-1."""
    positions: np.ndarray
    """(m,) int64 order positions, by row."""
    copies: np.ndarray
    """(m,) int64 in 0..repeats-1: which augmented copy of that position's sample, by row."""


@dataclass(frozen=True)
class BatchLayout:
    """How positions are laid out in steps. With R = repeats, micro-batch k of step s has the slots
    t = s * m + j, j = 0..m-1, of lane k: position (t // R) * K + k in its copy t % R.

    Args:
        global_batch: images per optimizer step over all ranks.
        micro_batch: images per forward pass of one rank.
        repeats: augmented copies of each sample.

    Raises:
        SettingError: `global_batch` is not a multiple of `micro_batch`.
    """

    global_batch: int
    micro_batch: int
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.global_batch % self.micro_batch:
            raise SettingError("global_batch", self.global_batch, f"not a multiple of micro_batch = {self.micro_batch}")

    @property
    def count(self) -> int:
        """K, the micro-batches of a step over all ranks."""
        return self.global_batch // self.micro_batch

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and step.

        Raises:
            SettingError: `global_batch` cannot be divided evenly among the ranks; names values that can.
        """
        if self.count % world_size == 0:
            return self.count // world_size
        unit = self.micro_batch * world_size
        valid = f"use {max(1, round(self.global_batch / unit)) * unit}"
        if self.global_batch % world_size == 0:
            share = self.global_batch // world_size
            smaller = next(size for size in range(min(self.micro_batch, share), 0, -1) if share % size == 0)
            valid += f" or micro_batch = {smaller}"
        raise SettingError(
            "global_batch",
            self.global_batch,
            f"its {self.count} micro-batches (micro_batch = {self.micro_batch}) are not divisible among {world_size} "
            f"ranks: {valid}",
        )

    def micro_batch_at(self, step: int, number: int) -> MicroBatch:
        """The rows of micro-batch `number` (0..K-1) of a step.

        The first half of the slots fills the rows from the top, the second half from the bottom. timm's mixup mixes
        row j with row m-1-j, so slots that are mixed are half a micro-batch apart and, if micro_batch >= 2 * repeats,
        never copies of one image.
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
            SettingError: as `accumulation`.
        """
        accumulation = self.accumulation(world_size)
        step = start_step
        while True:
            for index in range(accumulation):
                yield self.micro_batch_at(step, index * world_size + rank)
            step += 1

    def epoch_of(self, step: int, samples: int) -> int:
        """The epoch (from 0) in which a step begins. An epoch has as many images as the set has samples."""
        return step * self.global_batch // samples

    def epoch_end_step(self, epoch: int, samples: int) -> int:
        """The number of steps up to and including the one in which an epoch ends, i.e. the first step after it."""
        return -(-(epoch + 1) * samples // self.global_batch)

    def steps_in(self, epochs: int, samples: int) -> int:
        """Steps of a number of epochs from the start of a run; the last may reach into the next epoch."""
        return self.epoch_end_step(epochs - 1, samples)


def order_rank(rank: int, world_size: int, ranks_per_node: int) -> int:
    """The rank's number in the order, chosen such that the ranks of a node read from the same lanes.

    Launchers number the ranks node by node. The mapping is one to one, so a run's batches do not change.

    Args:
        rank: as the launcher numbers it.
        world_size: number of ranks.
        ranks_per_node: on every node; if it does not divide the world size, the rank keeps its number.
    """
    if world_size % ranks_per_node:
        return rank
    node, local = divmod(rank, ranks_per_node)
    return local * (world_size // ranks_per_node) + node
