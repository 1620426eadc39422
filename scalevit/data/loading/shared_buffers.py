"""Batches of images in shared memory that workers reuse.

torch's DataLoader allocates new shared memory for every batch. The kernel zeroes it and maps it page by page, in the
worker and again in the training process, and its file descriptor is sent through a socket: on a virtual machine that
takes over half a millisecond per image (docs/log.md). Here each worker fills a few buffers in turn, sends each of them
once, and afterwards only its number. Knows tensors and workers; must not know what the images are.
"""

import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

PREFETCHED = 2
"""Batches that a worker prepares before they are requested; torch's default."""


class BatchBuffers:
    """Stacks the images of a batch; in a worker, into the next of its buffers.

    A batch keeps its pixels until `held` more batches have been requested: a worker begins its batch j + PREFETCHED
    when the DataLoader returns its batch j, so with PREFETCHED + held buffers none of the last `held` is overwritten.
    This requires that the DataLoader returns batches in order, gives requests to the workers in turn, and prefetches
    PREFETCHED batches per worker; and that no worker ends before the others.

    Args:
        held: batches of all workers that the training process uses at the same time.
        workers: number of processes that make batches in turn; 0 without workers.
    """

    def __init__(self, held: int, workers: int) -> None:
        self.buffers = PREFETCHED + -(-held // max(1, workers))
        """Per worker."""
        # Copies of this object in the workers have the same number; each fills its own buffers.
        self._number = next(_numbers)
        _instances[self._number] = self
        self._batches = 0
        self._filled: dict[int, Tensor] = {}
        self._received: dict[tuple[int, int], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_filled": {}, "_received": {}}

    def __call__(self, images: Sequence[Tensor]) -> Any:
        """images: m of (3, S, S); returns (m, 3, S, S) in their memory format: decoders give (S, S, 3) in memory. In a
        worker it returns a handle, which becomes that tensor in the training process.
        """
        worker = get_worker_info()
        if worker is None:
            return _stacked(images)
        place = self._batches % self.buffers
        self._batches += 1
        buffer = self._filled.get(place)
        if buffer is not None and buffer.shape == (len(images), *images[0].shape):
            _stacked(images, out=buffer)
            return BufferHandle(self._number, worker.id, place, None)
        self._filled[place] = _stacked(images).share_memory_()
        return BufferHandle(self._number, worker.id, place, self._filled[place])


def _stacked(images: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    if images[0].stride(0) > 1:
        return torch.stack(list(images), out=out)
    channels_last = [image.movedim(0, -1) for image in images]
    return torch.stack(channels_last, out=None if out is None else out.movedim(1, -1)).movedim(-1, 1)


_numbers = itertools.count()
_instances: WeakValueDictionary[int, BatchBuffers] = WeakValueDictionary()


class BufferHandle:
    """A stacked batch that is sent from a worker to the training process."""

    def __init__(self, buffers: int, worker: int, place: int, images: Tensor | None) -> None:
        self._message = buffers, worker, place, images

    def __reduce__(self) -> tuple[Any, ...]:
        return receive_batch, self._message


def receive_batch(buffers: int, worker: int, place: int, images: Tensor | None) -> Tensor:
    """What a `BufferHandle` becomes when the training process unpickles it. (m, 3, S, S).

    Args:
        buffers: number of the `BatchBuffers`.
        worker: that filled the buffer.
        place: number of the buffer in that worker.
        images: the buffer itself when it is sent for the first time.
    """
    received = _instances[buffers]._received
    if images is not None:
        received[worker, place] = images
    return received[worker, place]
