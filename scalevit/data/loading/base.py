"""What the loaders share: batches, the epochs of training, and torch's DataLoader behind them.

Knows rank and world size as two integers; must not know models, engines or process groups.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from scalevit.data.faults import Fault
from scalevit.data.loading.shared_buffers import PREFETCHED
from scalevit.data.order.batching import BatchLayout, Split
from scalevit.data.order.image_sizes import ImageSizes
from scalevit.data.order.timm_order import TimmLayout
from scalevit.data.workers import initialise_worker, worker_context
from scalevit.errors import UserError

# Modules that the fork server imports once for all workers of a rank, if this process uses them. The transforms are
# among them because they import timm, which takes seconds.
_PRELOAD = (
    "scalevit.data.loading.train_loader",
    "scalevit.data.loading.evaluation_loader",
    "scalevit.data.transforms.timm_pipeline",
    "scalevit.data.transforms.fast",
)

Fingerprint = dict[str, str | int]
"""What must be equal for a step number to mean the same samples, by name."""

OnDevice = Callable[..., torch.Tensor]
"""The part of a transform that is applied to a batch's images on their device: images, and in training the rows' keys
(see `DeviceTransform`)."""


class Batch(NamedTuple):
    """The rows that a rank loads at once, see `Split`."""

    images: torch.Tensor
    """(m, 3, S, S) as the transform returns them: float32, or uint8 that `DeviceTransform` converts on the device. With
    workers they are in memory that is reused, see `TrainLoader.batches`. Padding is black. With V views of each row,
    (V * m, 3, S, S): the first views of all rows, then the second ones, ...
    """
    labels: torch.Tensor
    """(m,) int64; 0 for padding."""
    step: int
    """Optimizer step that it belongs to."""
    rows: torch.Tensor
    """(m,) int64, numbers in the global batch, `PADDING` for rows of weight 0, which come last."""
    faults: Sequence[Fault]
    """The bad samples that were replaced or skipped."""


class TrainingBatches(ABC):
    """Endless batches of one rank, in steps and epochs.

    Args:
        layout: of the global batch.
        micro_batch: maximum rows of a forward pass.
        samples: in an epoch.
        rank: of this process.
        world_size: number of ranks.
        workers: processes that load; 0 loads in this one.
        pin_memory: copy batches to page-locked memory, for faster transfers to an accelerator.
        finish: applied to a batch's images on their device, by the training loop.
        image_sizes: of the steps; None: all images have the same size.

    Raises:
        SettingError: `global_batch` is less than the number of ranks.
    """

    def __init__(
        self,
        layout: BatchLayout | TimmLayout,
        *,
        micro_batch: int,
        samples: int,
        rank: int,
        world_size: int,
        workers: int,
        pin_memory: bool,
        finish: OnDevice | None,
        image_sizes: ImageSizes | None = None,
    ) -> None:
        self.image_sizes = image_sizes
        self.layout, self.samples = layout, samples
        self.split = Split(layout.global_batch, world_size, micro_batch)
        """May be replaced by one with another micro-batch before batches are asked for."""
        self.finish = finish or first_argument
        self.rank = rank
        self._workers, self._pin_memory = workers, pin_memory
        context_for(workers)  # now, so that the workers' imports run while the model is built

    @property
    @abstractmethod
    def index_faults(self) -> Sequence[Fault]:
        """Samples of the shards that are never used because they are bad."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of labels 0..., where the set has them."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """See `Fingerprint`."""

    @abstractmethod
    def batches(self, start_step: int) -> Iterator[Batch]:
        """Endless batches from the first of an optimizer step on, `split.loads` of them per step."""

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) in which a step begins."""
        return self.layout.epoch_of(step, self.samples)

    def epoch_end_step(self, epoch: int) -> int:
        """The number of steps up to and including the one in which an epoch ends."""
        return self.layout.epoch_end_step(epoch, self.samples)

    def image_size(self, step: int) -> int | None:
        """Side in pixels of a step's images, where steps have several."""
        return None if self.image_sizes is None else self.image_sizes.of_step(step, self.epoch_of(step))

    def steps_in(self, epochs: int) -> int:
        """Steps of a number of epochs from the start of the run."""
        return self.layout.steps_in(epochs, self.samples)


def data_loader(
    dataset: Dataset[Any], requests: Iterable[Any] | None, workers: int, pin_memory: bool, *, keep_workers: bool
) -> DataLoader[Any]:
    """A DataLoader whose items are whole batches.

    Args:
        dataset: makes a batch from a request; or an iterable one of batches.
        requests: for a map-style `dataset`, None for an iterable one.
        workers: number of processes; 0 loads in this one.
        pin_memory: whether batches are copied to page-locked memory.
        keep_workers: whether workers are kept for the next iteration.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=to_worker_message,
        prefetch_factor=PREFETCHED if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=initialise_worker,
        multiprocessing_context=context_for(workers),
        persistent_workers=keep_workers and workers > 0,
        # The DataLoader draws a seed for its workers, which must not come from the training process's generator.
        generator=torch.Generator(),
    )


def context_for(workers: int) -> BaseContext | None:
    """The multiprocessing context for workers; None without workers."""
    if workers == 0:
        return None
    return worker_context(tuple(name for name in _PRELOAD if name in sys.modules))


def iterate_batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches as tensors; raises the `UserError` that a worker sent instead of a batch."""
    pin = loader.pin_memory and torch.accelerator.is_available()
    for item in loader:
        if isinstance(item, UserError):
            try:
                raise item
            finally:
                # Break the reference cycle between the exception and this frame; otherwise the workers are only shut
                # down by the garbage collector, after a time-out of 5 seconds.
                del item
        yield from_worker_message(item, pin)


def to_worker_message(item: Any) -> Any:
    """A batch with arrays instead of tensors, except the images. A tensor would be sent as a file descriptor through a
    socket, which takes half a millisecond in each of the two processes.
    """
    if isinstance(item, UserError):
        return item
    small = {name: value for name, value in item._asdict().items() if name != "images"}
    return item._replace(**{name: value.numpy() for name, value in small.items() if isinstance(value, torch.Tensor)})


def from_worker_message(item: Any, pin_memory: bool) -> Any:
    """Reverts `to_worker_message`."""
    tensors = {name: torch.from_numpy(value) for name, value in item._asdict().items() if isinstance(value, np.ndarray)}
    return item._replace(**{name: value.pin_memory() if pin_memory else value for name, value in tensors.items()})


def first_argument(item: Any, *others: Any) -> Any:
    """Returns its first argument: a transform that leaves nothing to be done on the device."""
    return item
