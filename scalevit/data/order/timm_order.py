"""The order of timm's RepeatAugSampler (without repeats: torch's DistributedSampler), computed for any step.

In each epoch the whole set is permuted, every image is repeated, and the processes share out the beginning of that
sequence, as long as the set, one image each in turn. So the copies of an image are in the batches of different
processes, an epoch shows only a part of the set, and a last partial batch is dropped. As in timm, the permutation
follows from the number of the epoch only. Knows integers and timm's samplers; must not know files or ranks.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from scalevit.errors import SettingError


@dataclass(frozen=True)
class TimmOrder:
    """The permutations of `length` samples, one for each epoch; with `TimmLayout` in the place of `Order`."""

    length: int
    seed: int = 0
    """timm's samplers have no other; that of a run does not change the order."""

    def __len__(self) -> int:
        return self.length

    @property
    def fingerprint(self) -> str:
        """What the order depends on, besides the length."""
        return "timm 1"

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """The samples at positions, as `Order.ids`."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.length)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            ids[epochs == epoch] = _permutation(self.length, int(epoch))[places[epochs == epoch]]
        return ids


@lru_cache(maxsize=2)  # the present epoch, and the next one at its end
def _permutation(length: int, epoch: int) -> np.ndarray:
    return torch.randperm(length, generator=torch.Generator().manual_seed(epoch)).numpy()


@dataclass(frozen=True)
class TimmLayout:
    """The rows of a global batch in that order; takes the place of `BatchLayout`.

    A group of rows is what one process of timm's run loads for one forward pass. It is mixed as `Mixup` does: row 2u of
    a group is its image u, and row 2u + 1 the u-th from its end.

    Raises:
        SettingError: `repeat_processes`: their groups do not divide the global batch. `global_batch`: it is larger than
            an epoch.
    """

    global_batch: int
    """Images per optimizer step over all ranks."""
    repeats: int
    """Copies of each image."""
    samples: int
    """Of the set."""
    group: int
    """Rows of a group."""
    processes: int = 1
    """Of timm's run; the ranks of this one may be others."""

    def __post_init__(self) -> None:
        if self.processes > 1 and self.global_batch % (self.group * self.processes):
            raise SettingError(
                "repeat_processes",
                self.processes,
                f"the global batch of {self.global_batch} must be a multiple of {self.processes * self.group}, of a "
                f"mixing group of {self.group} images for each process",
            )
        if not self._steps_per_epoch:
            raise SettingError(
                "global_batch", self.global_batch, f"is more than the {self._shown} images of an epoch in timm's order"
            )

    @property
    def version(self) -> str:
        """What a step number means, besides the order, the global batch and the repeats."""
        return f"timm 1, {self.processes} processes, groups of {self.group}"

    @cached_property
    def _shown(self) -> int:
        """Images of an epoch, over all processes."""
        if self.repeats == 1:  # as torch's DistributedSampler
            return -(-self.samples // self.processes) * self.processes
        sampler = RepeatAugSampler(range(self.samples), num_replicas=self.processes, rank=0, num_repeats=self.repeats)
        return len(sampler) * self.processes

    @property
    def _steps_per_epoch(self) -> int:
        return self._shown // self.global_batch

    def rows(self, step: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is in some rows of a step, as `BatchLayout.rows`. Images that fill up a small set are further copies."""
        epoch, within = divmod(step, self._steps_per_epoch)
        groups, places = np.divmod(rows, self.group)
        sizes = np.minimum(self.group, self.global_batch - groups * self.group)
        images = np.where(places % 2 == 0, places // 2, sizes - 1 - places // 2)
        rounds, processes = np.divmod(groups, self.processes)
        elements = within * self.global_batch + (rounds * self.group + images) * self.processes + processes
        again, elements = np.divmod(elements, self.samples * self.repeats)
        positions, copies = np.divmod(elements, self.repeats)
        return epoch * self.samples + positions, copies + again * self.repeats

    def epoch_of(self, step: int, samples: int) -> int:
        """The epoch (from 0) of a step."""
        return step // self._steps_per_epoch

    def epoch_end_step(self, epoch: int, samples: int) -> int:
        """The number of steps up to the end of an epoch."""
        return (epoch + 1) * self._steps_per_epoch

    def steps_in(self, epochs: int, samples: int) -> int:
        """Steps of a number of epochs from the start of a run."""
        return epochs * self._steps_per_epoch
