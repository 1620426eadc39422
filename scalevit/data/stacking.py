"""Images to batches, in shared memory that workers use again.

torch's DataLoader takes fresh shared memory for every batch. The kernel hands it over zeroed and page by page, to the
worker and again to the process that trains; on a virtual machine that costs half a millisecond per image (docs/LOG.md).
Here each worker has a few buffers and fills them in turn. Knows tensors and workers; must not know what they show.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch.utils.data import get_worker_info

# Batches that a worker prepares before they are asked for, torch's default.
PREFETCHED = 2


class Stack:
    """Stacks the images of a batch; in a worker into the next of its buffers.

    A batch holds its pixels until `held` more have been asked for: a worker is told to go on with batch j + PREFETCHED
    (of its own) when batch j is handed out, so with PREFETCHED + held buffers none of the last `held` is written to.

    Args:
        held: batches of all workers that the process which trains uses at a time.
        workers: number of processes that share them in turn; 0 where there are none.
    """

    def __init__(self, held: int, workers: int) -> None:
        self._own = PREFETCHED + -(-held // max(1, workers))
        self._buffers: deque[torch.Tensor] = deque(maxlen=self._own)
        self.buffers = self._own * workers
        """Of all workers."""

    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """images: m of (3, S, S); returns (m, 3, S, S) in their memory format: decoders give (S, S, 3) in memory."""
        if images[0].ndim == 3 and images[0].stride(0) == 1:
            return self._stacked([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
        return self._stacked(images)

    def _stacked(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        if get_worker_info() is None:
            return torch.stack(list(images))
        if len(self._buffers) < self._own:
            self._buffers.append(torch.empty((len(images), *images[0].shape), dtype=images[0].dtype).share_memory_())
        else:
            self._buffers.rotate(-1)
        return torch.stack(list(images), out=self._buffers[-1])
