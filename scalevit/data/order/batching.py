"""The layout of steps: which sample is in which row of a global batch, and which rank computes the row.

The content of a row depends on its number and the step only (`BatchLayout`). Ranks and micro-batches decide who
computes it and when (`Split`), so a run's numbers depend on neither. Knows integers; must not know files or tensors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from scalevit.data.order.shuffle import LANES, lanes_in_stream_order
from scalevit.errors import SettingError

VERSION = 2
"""Of the layout: a run that was begun with another cannot be resumed exactly."""
PADDING = -1
"""The number of a row that only fills up a batch; it has weight 0."""


@dataclass(frozen=True)
class BatchLayout:
    """The rows of a global batch of G images.

    Rows 2u and 2u + 1 are partners: mixup and CutMix mix them with each other, and every split keeps them together. The
    slots of a step belong to D lanes (a divisor of `LANES`), which read from different parts of the order. With R =
    repeats, slot t of lane l, counted from the start of the run, has the image at position (t // R) * D + l in its copy
    t % R. Partners are at least R slots apart in their lane, so they are never copies of one image (unless G < 2R).

    Args:
        global_batch: G, images per optimizer step over all ranks.
        repeats: augmented copies of each sample.
    """

    global_batch: int
    repeats: int = 1

    @property
    def version(self) -> int:
        """What a step number means, besides the global batch and the repeats."""
        return VERSION

    @cached_property
    def lanes(self) -> int:
        """D, the largest number of lanes of an equal and even number of slots, at least 2R."""
        divisors = (n for n in range(math.gcd(self.global_batch, LANES), 0, -1) if LANES % n == 0)
        suitable = (
            n for n in divisors if self.global_batch % (2 * n) == 0 and self.global_batch // n >= 2 * self.repeats
        )
        return next(suitable, 1)

    @cached_property
    def _lane_and_slot(self) -> tuple[np.ndarray, np.ndarray]:
        """(G,) and (G,): the lane of each row, and its slot in the lane within a step."""
        slots = _partners_in_turn(self.global_batch // self.lanes, self.repeats)
        return np.repeat(lanes_in_stream_order(self.lanes), len(slots)), np.tile(slots, self.lanes)

    def rows(self, step: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is in some rows of a step.

        Args:
            rows: (n,) in 0..G-1.

        Returns:
            (n,) int64 positions in the order, and (n,) int64 copies in 0..R-1.
        """
        lanes, slots = self._lane_and_slot
        places, copies = np.divmod(step * (self.global_batch // self.lanes) + slots[rows], self.repeats)
        return places * self.lanes + lanes[rows], copies

    def epoch_of(self, step: int, samples: int) -> int:
        """The epoch (from 0) in which a step begins. An epoch has as many images as the set has samples."""
        return step * self.global_batch // samples

    def epoch_end_step(self, epoch: int, samples: int) -> int:
        """The number of steps up to and including the one in which an epoch ends, i.e. the first step after it."""
        return -(-(epoch + 1) * samples // self.global_batch)

    def steps_in(self, epochs: int, samples: int) -> int:
        """Steps of a number of epochs from the start of a run; the last may reach into the next epoch."""
        return self.epoch_end_step(epochs - 1, samples)


def _partners_in_turn(slots: int, repeats: int) -> np.ndarray:
    """(slots,) int64: a lane's slots such that entries 2u and 2u + 1 are partners.

    Partners lie in the same segment of 2R slots, half of it apart; the last segment takes what is left.
    """
    count = max(1, slots // (2 * repeats))
    starts = 2 * repeats * np.arange(count)
    order = []
    for start, end in zip(starts, [*starts[1:], slots], strict=True):
        half = (end - start) // 2
        order += [place for pair in range(start, start + half) for place in (pair, pair + half)]
        order += range(start + 2 * half, end)  # an odd global batch has one row without a partner
    return np.array(order, np.int64)


class LoadedBatch(NamedTuple):
    """The rows that a rank loads at once: those of one micro-batch, or of two micro-batches of one row."""

    step: int
    """Optimizer step."""
    rows: np.ndarray
    """(m,) int64, numbers in the global batch, ascending, then `PADDING`."""


@dataclass(frozen=True)
class Split:
    """How the rows of a global batch are shared by ranks, and computed in micro-batches of equal size.

    Each rank has a contiguous range of pairs, so that the ranks of a node, which launchers number one after another,
    read from the same lanes. Where the numbers do not divide, rows of weight 0 fill up.

    Args:
        global_batch: rows per optimizer step.
        world_size: number of ranks, at most `global_batch`.
        micro_batch: maximum rows of a micro-batch; an odd one above 1 is used as the even number below.

    Raises:
        SettingError: `global_batch` is less than the number of ranks.
    """

    global_batch: int
    world_size: int
    micro_batch: int

    def __post_init__(self) -> None:
        if self.world_size > self.global_batch:
            raise SettingError("global_batch", self.global_batch, f"must be at least the {self.world_size} ranks")

    @property
    def _pairs(self) -> int:
        return -(-self.global_batch // 2)

    @property
    def _pairs_per_rank(self) -> int:
        return -(-self._pairs // self.world_size)

    @property
    def loads(self) -> int:
        """Batches that each rank loads in a step."""
        return -(-self._pairs_per_rank // max(1, self.micro_batch // 2))

    @property
    def loaded_rows(self) -> int:
        """Rows of each."""
        return 2 * -(-self._pairs_per_rank // self.loads)

    @property
    def size(self) -> int:
        """Rows of a micro-batch, the same for every rank and step."""
        return min(self.micro_batch, self.loaded_rows)

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step."""
        return self.loads * self.loaded_rows // self.size

    @property
    def padding(self) -> int:
        """Rows of weight 0 in a step, over all ranks."""
        return self.world_size * self.loads * self.loaded_rows - self.global_batch

    @property
    def padding_share(self) -> float:
        """`padding` relative to the global batch: the work that is added by it."""
        return self.padding / self.global_batch

    def of_rank(self, rank: int, step: int) -> Iterator[LoadedBatch]:
        """What a rank loads in a step."""
        start, end = (place * self._pairs // self.world_size for place in (rank, rank + 1))
        pairs = self.loaded_rows // 2
        for index in range(self.loads):
            first = min(start + index * pairs, end)
            last = min(first + pairs, end)
            rows = np.full(self.loaded_rows, PADDING, np.int64)
            real = np.arange(2 * first, min(2 * last, self.global_batch))
            rows[: len(real)] = real
            yield LoadedBatch(step, rows)
