"""Images to batches, in shared memory that workers use again.

torch's DataLoader takes fresh shared memory for every batch. The kernel hands it over zeroed and page by page, to the
worker and again to the process that trains, and its file descriptor goes through a socket: on a virtual machine that
takes over half a millisecond per image (docs/LOG.md). Here each worker has a few buffers that it fills in turn, hands
each over once, and from then on tells its number. Knows tensors and workers; must not know what they show.
"""

import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

# Batches that a worker prepares before they are asked for, torch's default.
PREFETCHED = 2


class Stack:
    """Stacks the images of a batch; in a worker into the next of its buffers.

    A batch holds its pixels until `held` more have been asked for: a worker is told to go on with batch j + PREFETCHED
    (of its own) when batch j is handed out, so with PREFETCHED + held buffers none of the last `held` is written to.
    For that all workers must take turns: none may end before the others.

    Args:
        held: batches of all workers that the process which trains uses at a time.
        workers: number of processes that share them in turn; 0 where there are none.
    """

    def __init__(self, held: int, workers: int) -> None:
        self.buffers = PREFETCHED + -(-held // max(1, workers))
        """Of each worker."""
        # The copies of this object in the workers have its number, and each fills buffers of its own.
        self._number = next(_numbers)
        _stacks[self._number] = self
        self._batches = 0
        self._filled: dict[int, Tensor] = {}
        self._arrived: dict[tuple[int, int], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_filled": {}, "_arrived": {}}

    def __call__(self, images: Sequence[Tensor]) -> Any:
        """images: m of (3, S, S); returns (m, 3, S, S) in their memory format: decoders give (S, S, 3) in memory. In a
        worker it returns what arrives as such in the process that trains.
        """
        worker = get_worker_info()
        if worker is None:
            return _stacked(images)
        place = self._batches % self.buffers
        self._batches += 1
        buffer = self._filled.get(place)
        if buffer is not None and buffer.shape == (len(images), *images[0].shape):
            _stacked(images, out=buffer)
            return _InBuffer(self._number, worker.id, place, None)
        self._filled[place] = _stacked(images).share_memory_()
        return _InBuffer(self._number, worker.id, place, self._filled[place])


def _stacked(images: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    if images[0].stride(0) > 1:
        return torch.stack(list(images), out=out)
    channels_last = [image.movedim(0, -1) for image in images]
    return torch.stack(channels_last, out=None if out is None else out.movedim(1, -1)).movedim(-1, 1)


_numbers = itertools.count()
_stacks: WeakValueDictionary[int, Stack] = WeakValueDictionary()


class _InBuffer:
    """Stands for a stacked batch on its way out of a worker."""

    def __init__(self, stack: int, worker: int, place: int, images: Tensor | None) -> None:
        self._told = stack, worker, place, images

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, self._told


def _arrive(stack: int, worker: int, place: int, images: Tensor | None) -> Tensor:
    arrived = _stacks[stack]._arrived
    if images is not None:
        arrived[worker, place] = images
    return arrived[worker, place]
