"""Evaluation batches of one rank: every sample exactly once over all ranks.

Knows rank and world size as two integers; must not know models, engines or process groups.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from scalevit.data.faults import Fault
from scalevit.data.loading.base import OnDevice, data_loader, first_argument, iterate_batches
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.shared_buffers import BatchBuffers
from scalevit.errors import UserError


class EvaluationBatch(NamedTuple):
    """The same number of rows on every rank; those with weight 0 are padding."""

    images: torch.Tensor
    """(b, 3, S, S), as in `base.Batch`."""
    labels: torch.Tensor
    """(b,) int64."""
    weights: torch.Tensor
    """(b,) float32, 1 for a sample and 0 for padding (zeros with label 0)."""
    decoded: torch.Tensor
    """(b,) bool, False for a sample that cannot be decoded (zeros with its own label), which must count as wrong."""
    real_labels: torch.Tensor
    """(b, L) int64, filled up with -1: all labels that are right; L is 0 where the loader has none."""
    faults: Sequence[Fault]
    """Of the samples that cannot be decoded."""


class EvaluationLoader:
    """Every sample exactly once over all ranks, in the same number of equal batches on each.

    Args:
        dataset: the validation samples.
        batch: maximum rows of a batch; they are as few as the number of batches allows.
        rank: of this process.
        world_size: number of ranks.
        workers: processes that load and are kept between evaluations; 0 loads in this one.
        real_labels: (N, L) int64 of all samples, see `read_real_labels`; None: there are none.
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
        finish: OnDevice | None = None,
        real_labels: np.ndarray | None = None,
    ) -> None:
        self.has_real_labels = real_labels is not None
        self.dataset, self.finish = dataset, finish or first_argument
        per_rank = -(-len(dataset) // world_size)
        self._count = -(-per_rank // batch)
        rows = -(-per_rank // self._count)
        self.rows = self._count * rows
        """Of each rank, with padding."""
        padded = np.arange(self._count * rows) * world_size + rank
        requests = np.where(padded < len(dataset), padded, -1).reshape(self._count, rows)
        real = np.empty((len(dataset), 0), np.int64) if real_labels is None else real_labels
        evaluation = _Evaluation(dataset, BatchBuffers(held=1, workers=workers), real)
        self._loader = data_loader(evaluation, requests, workers, pin_memory, keep_workers=True)

    def __len__(self) -> int:
        """Batches of each rank."""
        return self._count

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """With workers, a batch's images are overwritten once the next batch is requested.

        Raises:
            UserError: while iterating: a shard is missing, changed or cannot be reached.
        """
        return iterate_batches(self._loader)


class _Evaluation(Dataset[EvaluationBatch | UserError]):
    """Makes batches in the workers. A `UserError` is returned, not raised: the DataLoader would add its traceback."""

    def __init__(self, dataset: ShardDataset, buffers: BatchBuffers, real_labels: np.ndarray) -> None:
        self.dataset, self.buffers, self.real_labels = dataset, buffers, real_labels

    def __getitem__(self, samples: np.ndarray) -> EvaluationBatch | UserError:
        """samples: (b,) int64, -1 for padding."""
        real = samples >= 0
        try:
            self.dataset.reader.prefetch(samples[real])
            rows = [self.dataset.image(int(sample)) if sample >= 0 else None for sample in samples]
        except UserError as error:
            return error
        tensors = [row for row in rows if isinstance(row, torch.Tensor)]
        blank = torch.zeros_like(tensors[0]) if tensors else self.dataset.blank()
        images = self.buffers([row if isinstance(row, torch.Tensor) else blank for row in rows])
        faults = [row for row in rows if isinstance(row, Fault)]
        decoded = torch.tensor([not isinstance(row, Fault) for row in rows])
        labels = torch.from_numpy(np.where(real, self.dataset.index.label[samples], 0))
        weights = torch.from_numpy(real.astype(np.float32))
        real_labels = torch.from_numpy(np.where(real[:, None], self.real_labels[samples], -1))
        return EvaluationBatch(images, labels, weights, decoded, real_labels, faults)
