"""Batches for one rank: endless and exactly resumable for training, every sample once for evaluation.

Knows rank and world size as two integers; must not know models, engines or process groups. Whatever is random is
decided by positions before a worker sees it, so neither workers nor ranks change a batch.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from scalevit.data.faults import Fault
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.shared_buffers import PREFETCHED, Stack
from scalevit.data.order.batching import Batching
from scalevit.data.order.shuffle import Order
from scalevit.data.workers import hidden_main, initialise_worker, worker_context
from scalevit.errors import UserError

# What the fork server imports once for all workers of a rank: this, and where they are used the transforms, which bring
# timm and its seconds.
_PRELOAD = (
    "scalevit.data.loading.train_loader",
    "scalevit.data.transforms.timm_pipeline",
    "scalevit.data.transforms.fast",
)

# Batches per worker between the fetching of a remote sample and its use.
_READ_AHEAD = 4

_IDS_AT_ONCE = 4096

Fingerprint = dict[str, str | int]
Finisher = Callable[[torch.Tensor], torch.Tensor]


class Batch(NamedTuple):
    """One training micro-batch."""

    images: torch.Tensor
    """(m, 3, S, S) as the transform makes them: float32, or uint8 that `Finish` makes float32 on the device. Those of
    workers lie in memory that is used again, see `TrainLoader.batches`.
    """
    labels: torch.Tensor
    """(m,) int64."""
    step: int
    """Optimizer step that it belongs to."""
    micro_batch: int
    """Number k of the micro-batch in its step, over all ranks: what is random in it is seeded by (step, k)."""
    samples: torch.Tensor
    """(m,) int64 numbers in the index of what is shown."""
    faults: Sequence[Fault]
    """Of bad samples in whose place others are shown."""


class EvaluationBatch(NamedTuple):
    """Equal rows on every rank; those with weight 0 are padding."""

    images: torch.Tensor
    """(b, 3, S, S), likewise."""
    labels: torch.Tensor
    """(b,) int64."""
    weights: torch.Tensor
    """(b,) float32, 1 for a sample and 0 for padding (zeros with label 0)."""
    decoded: torch.Tensor
    """(b,) bool, False for a sample that cannot be decoded (zeros with its own label), which must count as wrong."""
    faults: Sequence[Fault]
    """Of those."""


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
        finish: what is left to do to a batch's images on their device, kept for the training loop as `finish`.

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
        finish: Finisher | None = None,
    ) -> None:
        self.finish = finish or unchanged
        if len(order) != len(dataset):
            raise ValueError(f"an order of {len(order)} for {len(dataset)} samples")
        self.dataset, self.order = dataset, order
        self.batching = Batching(global_batch, micro_batch, repeats)
        self.accumulation = self.batching.accumulation(world_size)
        self.rank, self.world_size = rank, world_size
        self._workers, self._pin_memory = workers, pin_memory
        _context(workers)  # so that the imports of the workers run beside the building of the model

    @property
    def samples(self) -> int:
        """In an epoch."""
        return len(self.dataset)

    @property
    def index_faults(self) -> Sequence[Fault]:
        """Samples of the shards that the order leaves out."""
        return self.dataset.index.faults

    @property
    def fingerprint(self) -> Fingerprint:
        """What must be equal for a step number to mean the same samples; by name, so that a difference can be told.
        See `check_fingerprint`.
        """
        batching = self.batching
        return {
            "samples": len(self.dataset),
            "index": self.dataset.index.fingerprint,
            "seed": self.order.seed,
            "order": self.order.fingerprint,
            "augmentation_seed": self.dataset.seed,
            "global_batch": batching.global_batch,
            "micro_batch": batching.micro_batch,
            "repeats": batching.repeats,
        }

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Endless micro-batches from the first of an optimizer step on, `accumulation` of them per step.

        With workers a batch's images hold until so many more have been asked for: copy what is to last longer.

        Raises:
            UserError: while iterating: a shard that is gone, changed or out of reach. Single bad samples are replaced
                and listed in the batch.
        """
        requests = _with_what_comes(self._requests(start_step), distance=_READ_AHEAD * max(1, self._workers))
        training = _Training(self.dataset, Stack(held=self.accumulation, workers=self._workers))
        return items(data_loader(training, requests, self._workers, self._pin_memory, keep_workers=False))

    def _requests(self, start_step: int) -> Iterator["_Request"]:
        rows = self.batching.of_rank(self.rank, self.world_size, start_step)
        # An id costs 1 us among thousands and 10 us among the few of one batch; each epoch is a call of its own.
        an_epoch = -(-len(self.dataset) * self.batching.repeats // self.batching.global_batch) * self.accumulation
        while block := list(islice(rows, min(an_epoch, -(-_IDS_AT_ONCE // self.batching.micro_batch)))):
            ids = self.order.ids(np.concatenate([batch.positions for batch in block]))
            for batch, samples in zip(block, np.split(ids, len(block)), strict=True):
                yield _Request(batch.step, batch.number, samples, batch.positions, batch.copies)

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
        pin_memory, finish: as for `TrainLoader`.
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
        finish: Finisher | None = None,
    ) -> None:
        self.dataset, self.finish = dataset, finish or unchanged
        per_rank = -(-len(dataset) // world_size)
        self._count = -(-per_rank // batch)
        rows = -(-per_rank // self._count)
        padded = np.arange(self._count * rows) * world_size + rank
        requests = np.where(padded < len(dataset), padded, -1).reshape(self._count, rows)
        evaluation = _Evaluation(dataset, Stack(held=1, workers=workers))
        self._loader = data_loader(evaluation, requests, workers, pin_memory, keep_workers=True)

    def __len__(self) -> int:
        """Batches of each rank."""
        return self._count

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """With workers a batch's images hold until the next is asked for.

        Raises:
            UserError: while iterating: a shard that is gone, changed or out of reach.
        """
        return items(self._loader)


def check_fingerprint(saved: Mapping[str, str | int], present: Mapping[str, str | int], where: str) -> None:
    """Refuses to go on in another order than that in which a run began.

    Args:
        saved: `TrainLoader.fingerprint` of the run so far.
        present: of the run that is to go on.
        where: what holds the first, for the message.

    Raises:
        UserError: they differ; names all that does.
    """
    names = {
        "samples": "number of training samples",
        "index": "training shards",
        "order": "version of the order",
        "augmentation_seed": "seed of the augmentation",
        "global_batch": "train.global_batch",
        "micro_batch": "train.micro_batch",
        "repeats": "data.augmentation.aug_repeats",
    }
    differing = [name for name in {**saved, **present} if saved.get(name) != present.get(name)]
    # The order's digest follows from length and seed: it is worth naming only where they agree.
    if {"samples", "seed"} & set(differing):
        differing = [name for name in differing if name != "order"]
    if differing:
        told = "; ".join(
            f"{names.get(name, name)}: {saved.get(name, 'none')} there, {present.get(name, 'none')} now"
            for name in differing
        )
        raise UserError(
            f"{where}: the samples would come in another order ({told}): go on with the data and settings of the run, "
            "or choose another name"
        )


# --- in the workers ---------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """What a worker is to make one training batch of; arrays are (m,)."""

    step: int
    micro_batch: int
    samples: np.ndarray
    positions: np.ndarray
    copies: np.ndarray
    soon: np.ndarray = np.arange(0)
    """Samples of later batches, to be fetched meanwhile."""


def _with_what_comes(requests: Iterator[_Request], distance: int) -> Iterator[_Request]:
    """Gives each request the samples of the one `distance` later, and the first those of all before that."""
    waiting: deque[_Request] = deque()
    for request in requests:
        waiting.append(request)
        if len(waiting) == distance + 1:
            break
    soon = [request.samples for request in list(waiting)[1:]]
    while waiting:
        yield waiting.popleft()._replace(soon=np.concatenate(soon) if soon else np.arange(0))
        following = next(requests, None)
        soon = [] if following is None else [following.samples]
        waiting.extend([] if following is None else [following])


class _Training(Dataset[Batch | UserError]):
    """Requests to batches. A user's mistake is handed over, not raised: the DataLoader would add its traceback."""

    def __init__(self, dataset: ShardDataset, stack: Stack) -> None:
        self.dataset, self.stack = dataset, stack

    def __getitem__(self, request: _Request) -> Batch | UserError:
        tensors: list[torch.Tensor] = [torch.empty(0)] * len(request.samples)
        samples = request.samples.copy()
        faults: list[Fault] = []
        try:
            self.dataset.reader.announce(request.soon)
            for position in np.unique(request.positions):
                # All copies of an image in this batch come from one decode.
                rows = np.flatnonzero(request.positions == position)
                shown = self.dataset.copies(int(samples[rows[0]]), int(position), request.copies[rows].tolist())
                for row, tensor in zip(rows, shown.tensors, strict=True):
                    tensors[row] = tensor
                samples[rows] = shown.sample
                faults += shown.faults
        except UserError as error:
            return error
        labels = torch.from_numpy(self.dataset.index.label[samples])
        numbers = torch.from_numpy(samples)
        return Batch(self.stack(tensors), labels, request.step, request.micro_batch, numbers, faults)


class _Evaluation(Dataset[EvaluationBatch | UserError]):
    def __init__(self, dataset: ShardDataset, stack: Stack) -> None:
        self.dataset, self.stack = dataset, stack

    def __getitem__(self, samples: np.ndarray) -> EvaluationBatch | UserError:
        """samples: (b,) int64, -1 for padding."""
        real = samples >= 0
        try:
            self.dataset.reader.announce(samples[real])
            shown = [self.dataset.image(int(sample)) if sample >= 0 else None for sample in samples]
        except UserError as error:
            return error
        tensors = [item for item in shown if isinstance(item, torch.Tensor)]
        blank = torch.zeros_like(tensors[0]) if tensors else self.dataset.blank()
        images = self.stack([item if isinstance(item, torch.Tensor) else blank for item in shown])
        faults = [item for item in shown if isinstance(item, Fault)]
        decoded = torch.tensor([not isinstance(item, Fault) for item in shown])
        labels = torch.from_numpy(np.where(real, self.dataset.index.label[samples], 0))
        return EvaluationBatch(images, labels, torch.from_numpy(real.astype(np.float32)), decoded, faults)


# --- torch's DataLoader -----------------------------------------------------------------------------------


def data_loader(
    dataset: Dataset[Any], requests: Iterable[Any] | None, workers: int, pin_memory: bool, *, keep_workers: bool
) -> DataLoader[Any]:
    """A DataLoader whose items are whole batches, each made from one request by one worker, or for an iterable data set
    (without requests) by the workers in turn.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_packed,
        prefetch_factor=PREFETCHED if workers else None,
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


def items(loader: DataLoader[Any]) -> Iterator[Any]:
    """What workers made; raises the `UserError` that one handed over."""
    with hidden_main():
        iterator = iter(loader)
    pin = loader.pin_memory and torch.accelerator.is_available()
    for item in iterator:
        if isinstance(item, UserError):
            try:
                raise item
            finally:
                # Else the error and this frame hold each other, and workers that only the garbage collector lets go of
                # end after a time-out of 5 seconds.
                del item
        yield _unpacked(item, pin)


def _packed(item: Any) -> Any:
    """A batch with arrays instead of tensors but for the images: a tensor is handed over as a file descriptor through a
    socket, which takes half a millisecond of both processes.
    """
    if isinstance(item, UserError):
        return item
    small = {name: value for name, value in item._asdict().items() if name != "images"}
    return item._replace(**{name: value.numpy() for name, value in small.items() if isinstance(value, torch.Tensor)})


def _unpacked(item: Any, pin_memory: bool) -> Any:
    tensors = {name: torch.from_numpy(value) for name, value in item._asdict().items() if isinstance(value, np.ndarray)}
    return item._replace(**{name: value.pin_memory() if pin_memory else value for name, value in tensors.items()})


def unchanged(item: Any) -> Any:
    """The item."""
    return item
