"""Training batches of one rank: endless, and resumable exactly at any step.

Everything random is determined by positions before a worker sees it, so neither workers nor ranks change a row. Knows
rank and world size as two integers; must not know models, engines or process groups.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from scalevit.data.faults import Fault
from scalevit.data.loading.base import Batch, Fingerprint, OnDevice, TrainingBatches, data_loader, iterate_batches
from scalevit.data.loading.dataset import ShardDataset, images_of
from scalevit.data.loading.shared_buffers import BatchBuffers
from scalevit.data.order.batching import PADDING, BatchLayout
from scalevit.data.order.image_sizes import ImageSizes
from scalevit.data.order.shuffle import Order
from scalevit.data.order.timm_order import TimmLayout, TimmOrder
from scalevit.data.transforms.base import Transform
from scalevit.errors import UserError

# Batches per worker between the prefetching of a remote sample and its use.
_READ_AHEAD = 4

_IDS_AT_ONCE = 4096


class TrainLoader(TrainingBatches):
    """Batches of one rank, laid out by `BatchLayout` or `TimmLayout` and split by `Split`.

    Args:
        dataset: the training samples.
        order: of the same number of samples.
        global_batch: images per optimizer step over all ranks.
        micro_batch: maximum rows of a forward pass.
        repeats: augmented copies of each decoded image.
        layout: of the same global batch and repeats; None: a `BatchLayout`.
        image_sizes: of the steps, where there are several.
        by_size: the transform for images of each of them, in the place of the dataset's.
        rank, world_size, workers, pin_memory, finish: as for `TrainingBatches`.

    Raises:
        SettingError: `global_batch` is less than the number of ranks.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        order: Order | TimmOrder,
        *,
        global_batch: int,
        micro_batch: int,
        repeats: int = 1,
        layout: TimmLayout | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        finish: OnDevice | None = None,
        image_sizes: ImageSizes | None = None,
        by_size: Mapping[int, Transform] | None = None,
    ) -> None:
        if len(order) != len(dataset):
            raise ValueError(f"an order of {len(order)} for {len(dataset)} samples")
        super().__init__(
            layout or BatchLayout(global_batch, repeats),
            micro_batch=micro_batch,
            samples=len(dataset),
            rank=rank,
            world_size=world_size,
            workers=workers,
            pin_memory=pin_memory,
            finish=finish,
            image_sizes=image_sizes,
        )
        self.dataset, self.order = dataset, order
        self._by_size = dict(by_size or {})

    @property
    def index_faults(self) -> Sequence[Fault]:
        return self.dataset.index.faults

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.dataset.index.classes

    @property
    def fingerprint(self) -> Fingerprint:
        layout = self.layout
        return {
            "samples": self.samples,
            "index": self.dataset.index.fingerprint,
            "seed": self.order.seed,
            "order": self.order.fingerprint,
            "augmentation_seed": self.dataset.seed,
            "layout": layout.version,
            "global_batch": layout.global_batch,
            "repeats": layout.repeats,
        }

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Endless batches from the first of an optimizer step on, `split.loads` of them per step.

        With workers, a batch's images are overwritten once as many more batches have been requested: copy what is
        needed for longer.

        Raises:
            UserError: while iterating: a shard is missing, changed or cannot be reached. Single bad samples are
                replaced and listed in the batch.
        """
        requests = with_lookahead(self._requests(start_step), distance=_READ_AHEAD * max(1, self._workers))
        datasets: dict[int | None, ShardDataset] = {None: self.dataset}
        datasets |= {side: self.dataset.with_transform(transform) for side, transform in self._by_size.items()}
        training = _Training(datasets, BatchBuffers(held=self.split.loads, workers=self._workers))
        return iterate_batches(data_loader(training, requests, self._workers, self._pin_memory, keep_workers=False))

    def _requests(self, start_step: int) -> Iterator["_Request"]:
        # An id takes 1 us in a call for thousands and 10 us in a call for one batch; an epoch is at most one call.
        an_epoch = -(-self.samples * self.layout.repeats // self.layout.global_batch)
        at_once = min(an_epoch, -(-_IDS_AT_ONCE // (self.split.loads * self.split.loaded_rows)))
        for step in count(start_step, at_once):
            loads = [load for each in range(step, step + at_once) for load in self.split.of_rank(self.rank, each)]
            real = [load.rows[load.rows != PADDING] for load in loads]
            contents = [self.layout.rows(load.step, rows) for load, rows in zip(loads, real, strict=True)]
            ids = self.order.ids(np.concatenate([positions for positions, _ in contents]))
            parts = np.split(ids, np.cumsum([len(rows) for rows in real])[:-1])
            for load, samples, (positions, copies) in zip(loads, parts, contents, strict=True):
                yield _Request(load.step, load.rows, samples, positions, copies, self.image_size(load.step))


def check_fingerprint(
    saved: Mapping[str, str | int],
    present: Mapping[str, str | int],
    where: str,
    names: Mapping[str, str] | None = None,
) -> None:
    """Refuses to resume a run in another order than that in which it began.

    Args:
        saved: `TrainLoader.fingerprint` of the run so far.
        present: of the run that is to be resumed.
        where: the source of `saved`, for the message.
        names: what to call entries in the message, e.g. the config keys of their settings.

    Raises:
        UserError: they differ; names all differences.
    """
    texts = {
        "samples": "number of training samples",
        "index": "training shards",
        "order": "version of the order",
        "layout": "version of the batches' layout",
        "augmentation_seed": "seed of the augmentation",
        **(names or {}),
    }
    differing = [name for name in {**saved, **present} if saved.get(name) != present.get(name)]
    # The order's digest follows from length and seed: it is worth naming only if they are equal.
    if {"samples", "seed"} & set(differing):
        differing = [name for name in differing if name != "order"]
    if differing:
        changes = "; ".join(
            f"{texts.get(name, name)}: {saved.get(name, 'none')} there, {present.get(name, 'none')} now"
            for name in differing
        )
        raise UserError(
            f"{where}: the samples would come in another order ({changes}): resume with the data and settings of the "
            "run, or choose another name"
        )


# --- in the workers ---------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """One training batch that a worker is to make."""

    step: int
    rows: np.ndarray
    """(m,), with padding."""
    samples: np.ndarray
    """(n,), as positions and copies: of the n rows that are no padding."""
    positions: np.ndarray
    copies: np.ndarray
    image_size: int | None
    """Side in pixels, where steps have several."""
    upcoming: np.ndarray = np.arange(0)
    """Samples of later batches, to be prefetched."""


def with_lookahead(requests: Iterator[_Request], distance: int) -> Iterator[_Request]:
    """Adds to each request the samples of the one `distance` later, and to the first those of all between."""
    waiting: deque[_Request] = deque()
    for request in requests:
        waiting.append(request)
        if len(waiting) == distance + 1:
            break
    upcoming = [request.samples for request in list(waiting)[1:]]
    while waiting:
        yield waiting.popleft()._replace(upcoming=np.concatenate(upcoming) if upcoming else np.arange(0))
        following = next(requests, None)
        upcoming = [] if following is None else [following.samples]
        waiting.extend([] if following is None else [following])


class _Training(Dataset[Batch | UserError]):
    """Makes batches from requests. A `UserError` is returned, not raised: the DataLoader would add its traceback."""

    def __init__(self, datasets: Mapping[int | None, ShardDataset], buffers: BatchBuffers) -> None:
        """
        Args:
            datasets: the same samples by the size that their transform gives images.
            buffers: for the batches.
        """
        self.datasets, self.buffers = datasets, buffers

    def __getitem__(self, request: _Request) -> Batch | UserError:
        dataset = self.datasets[request.image_size]
        tensors: list[torch.Tensor] = [torch.empty(0)] * len(request.samples)
        padding = len(request.rows) - len(request.samples)
        samples = request.samples.copy()
        faults: list[Fault] = []
        try:
            dataset.reader.prefetch(request.upcoming)
            for position in np.unique(request.positions):
                # All copies of an image in this batch come from one decode.
                rows = np.flatnonzero(request.positions == position)
                augmented = dataset.copies(int(samples[rows[0]]), int(position), request.copies[rows].tolist())
                for row, tensor in zip(rows, augmented.tensors, strict=True):
                    tensors[row] = tensor
                samples[rows] = augmented.sample
                faults += augmented.faults
            if padding:
                tensors += [torch.zeros_like(tensors[0]) if tensors else dataset.blank()] * padding
        except UserError as error:
            return error
        labels = torch.from_numpy(np.append(dataset.index.label[samples], np.zeros(padding, np.int64)))
        return Batch(self.buffers(images_of(tensors)), labels, request.step, torch.from_numpy(request.rows), faults)
