"""The size of the images of each optimizer step, where a run trains at several: a function of the seed and the step.

All rows of a step have the same size, on every rank. Knows integers and timm's schedule of sizes; must not know files,
transforms or ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import SequentialSampler

from scalevit.randomness import Purpose, row_keys, uniforms


@dataclass(frozen=True)
class ImageSizes:
    """Draws a size for each step, with the probabilities that timm's scheduled loader has in the step's epoch."""

    sides: tuple[int, ...]
    """In pixels."""
    weights: tuple[float, ...] | None = None
    """Of the sides; None: equal ones. A side of weight 0 is never drawn."""
    progressive: bool = False
    """Whether the probabilities move from the first side to the last; they are constant otherwise."""
    epochs: int = 1
    """That this takes."""
    spread: float = 0.65
    """Standard deviation of the probabilities around the present place in the list."""
    random_mix: float = 0.1
    """Share of the draws that are of any side, in every epoch."""
    seed: int = 0
    """Of the draws."""

    @cached_property
    def _schedule(self) -> ScheduledBatchSampler:
        return ScheduledBatchSampler(
            SequentialSampler(self.sides),
            [1] * len(self.sides),
            choice_weights=self.weights,
            num_batches=1,
            choice_schedule="progressive" if self.progressive else "constant",
            schedule_epochs=self.epochs,
            schedule_spread=self.spread,
            schedule_random_mix=self.random_mix,
        )

    def probabilities(self, epoch: int) -> Sequence[float]:
        """Of the sides in an epoch (from 0): timm's."""
        return self._schedule.choice_weights_for_epoch(epoch).tolist()

    def of_step(self, step: int, epoch: int) -> int:
        """The side in pixels of the images of a step.

        Args:
            step: number of the optimizer step.
            epoch: in which it begins.
        """
        sums = np.cumsum(self.probabilities(epoch))
        key = row_keys(self.seed, Purpose.IMAGE_SIZE, step, np.zeros(1, np.int64))
        drawn = uniforms(key, 1)[0, 0] * sums[-1]
        return self.sides[int(np.searchsorted(sums, drawn, side="right"))]
