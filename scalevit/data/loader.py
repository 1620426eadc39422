"""Batches for one rank: endless and exactly resumable for training, every sample once for evaluation.

Knows rank and world size as two integers; must not know models, engines or process groups. Whatever is random is
decided by positions before a worker sees it, so neither workers nor ranks change a batch.
"""

import sys
from collections.abc import Iterable, Iterator
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from scalevit.data.batches import Batching
from scalevit.data.dataset import ShardDataset
from scalevit.data.order import Order
from scalevit.data.processes import hidden_main, initialise_worker, worker_context
from scalevit.errors import UserError

# What the fork server imports once for all workers of a rank: this, and where they are used the transforms, which bring
# timm and its seconds.
_PRELOAD = ("scalevit.data.loader", "scalevit.data.transforms")


class Batch(NamedTuple):
    """One training micro-batch."""

    images: torch.Tensor
    """(m, 3, S, S) float32."""
    labels: torch.Tensor
    """(m,) int64."""
    step: int
    """Optimizer step that it belongs to."""
    micro_batch: int
    """Number k of the micro-batch in its step, over all ranks: what is random in it is seeded by (step, k)."""


class EvaluationBatch(NamedTuple):
    """Equal rows on every rank; those with weight 0 are padding."""

    images: torch.Tensor
    """(b, 3, S, S) float32."""
    labels: torch.Tensor
    """(b,) int64."""
    weights: torch.Tensor
    """(b,) float32, 1 for a sample and 0 for padding (a black image with label 0)."""


class TrainLoader:
    """Micro-batches of one rank in the order of `batches.Batching`.

    Args:
        dataset: the training samples.
        order: of as many samples.
        global_batch: images per optimizer step over all ranks.
        micro_batch: images per batch of this loader.
        repeats: augmented copies of each decoded image.
        rank: of this process.
        world_size: number of ranks.
        workers: processes that load; 0 loads in this one.
        pin_memory: copy batches to page-locked memory, for faster transfers to an accelerator.

    Raises:
        UserError: batch sizes that the ranks cannot share.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        order: Order,
        *,
        global_batch: int,
        micro_batch: int,
        repeats: int = 1,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if len(order) != len(dataset):
            raise ValueError(f"an order of {len(order)} for {len(dataset)} samples")
        self.dataset, self.order = dataset, order
        self.batching = Batching(global_batch, micro_batch, repeats)
        self.accumulation = self.batching.accumulation(world_size)
        self.rank, self.world_size = rank, world_size
        self._workers, self._pin_memory = workers, pin_memory
        _context(workers)  # so that the imports of the workers run beside the building of the model

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """What must be equal for a step number to mean the same samples; by name, so that a difference can be told."""
        batching = self.batching
        return {
            "index": self.dataset.index.fingerprint,
            "order": self.order.fingerprint,
            "augmentation_seed": self.dataset.seed,
            "global_batch": batching.global_batch,
            "micro_batch": batching.micro_batch,
            "repeats": batching.repeats,
        }

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Endless micro-batches from the first of an optimizer step on, `accumulation` of them per step.

        Raises:
            UserError: while iterating: an image that cannot be read or decoded.
        """
        requests = (
            _Request(rows.step, rows.number, self.order.ids(rows.positions), rows.positions, rows.copies)
            for rows in self.batching.of_rank(self.rank, self.world_size, start_step)
        )
        training = _Training(self.dataset)
        return _items(_data_loader(training, requests, self._workers, self._pin_memory, keep_workers=False))

    def epoch_end_step(self, epoch: int) -> int:
        """The first optimizer step after an epoch: epoch e has as many images as the set, and ends inside or at the
        end of the step before this one.
        """
        return -(-(epoch + 1) * len(self.dataset) // self.batching.global_batch)

    def steps_in(self, epochs: int) -> int:
        """Optimizer steps of so many epochs from the start of the run."""
        return self.epoch_end_step(epochs - 1)


class EvaluationLoader:
    """Every sample exactly once over all ranks, in the same number of equal batches on each.

    Args:
        dataset: the validation samples.
        batch: most rows of a batch; they are as few as the number of batches allows.
        rank: of this process.
        world_size: number of ranks.
        workers: processes that load and stay between evaluations; 0 loads in this one.
        pin_memory: as for `TrainLoader`.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        per_rank = -(-len(dataset) // world_size)
        self._count = -(-per_rank // batch)
        rows = -(-per_rank // self._count)
        padded = np.arange(self._count * rows) * world_size + rank
        requests = np.where(padded < len(dataset), padded, -1).reshape(self._count, rows)
        self._loader = _data_loader(_Evaluation(dataset), requests, workers, pin_memory, keep_workers=True)

    def __len__(self) -> int:
        """Batches of each rank."""
        return self._count

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """Raises UserError while iterating: an image that cannot be read or decoded."""
        return _items(self._loader)


# --- in the workers ---------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """What a worker is to make one training batch of; arrays are (m,)."""

    step: int
    micro_batch: int
    samples: np.ndarray
    positions: np.ndarray
    copies: np.ndarray


class _Training(Dataset[Batch | UserError]):
    """Requests to batches. A user's mistake is handed over, not raised: the DataLoader would add its traceback."""

    def __init__(self, dataset: ShardDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, request: _Request) -> Batch | UserError:
        tensors: list[Any] = [None] * len(request.samples)
        try:
            for position in np.unique(request.positions):
                # All copies of an image in this batch come from one decode.
                rows = np.flatnonzero(request.positions == position)
                sample, copies = int(request.samples[rows[0]]), request.copies[rows].tolist()
                for row, tensor in zip(rows, self.dataset.copies(sample, int(position), copies), strict=True):
                    tensors[row] = tensor
        except UserError as error:
            return error
        labels = torch.from_numpy(self.dataset.index.label[request.samples])
        return Batch(torch.stack(tensors), labels, request.step, request.micro_batch)


class _Evaluation(Dataset[EvaluationBatch | UserError]):
    def __init__(self, dataset: ShardDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, samples: np.ndarray) -> EvaluationBatch | UserError:
        """samples: (b,) int64, -1 for padding."""
        real = samples >= 0
        try:
            # Where all of it is padding, another sample tells the shape.
            shown = [self.dataset[sample][0] for sample in (samples[real].tolist() or [0])]
        except UserError as error:
            return error
        images = shown[0].new_zeros(len(samples), *shown[0].shape)
        if real.any():
            images[torch.from_numpy(real)] = torch.stack(shown)
        labels = np.where(real, self.dataset.index.label[samples], 0)
        return EvaluationBatch(images, torch.from_numpy(labels), torch.from_numpy(real.astype(np.float32)))


# --- torch's DataLoader -----------------------------------------------------------------------------------


def _data_loader(
    dataset: Dataset[Any], requests: Iterable[Any], workers: int, pin_memory: bool, *, keep_workers: bool
) -> DataLoader[Any]:
    """A DataLoader whose items are whole batches, each made from one request by one worker."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=initialise_worker,
        multiprocessing_context=_context(workers),
        persistent_workers=keep_workers and workers > 0,
        # The DataLoader draws a seed for its workers, which must not come from the training process's generator.
        generator=torch.Generator(),
    )


def _context(workers: int) -> BaseContext | None:
    if workers == 0:
        return None
    return worker_context(tuple(name for name in _PRELOAD if name in sys.modules))


def _items(loader: DataLoader[Any]) -> Iterator[Any]:
    with hidden_main():
        iterator = iter(loader)
    for item in iterator:
        if isinstance(item, UserError):
            try:
                raise item
            finally:
                # Else the error and this frame hold each other, and workers that only the garbage collector lets go of
                # end after a time-out of 5 seconds.
                del item
        yield item


def _unchanged(item: Any) -> Any:
    return item
