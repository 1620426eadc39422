"""From a sample's number to its tensor: read, decode, augment.

Knows the index, images and a transform (any function from an RGB Pillow image to a tensor); must not know ranks,
batches or loaders. The pixels of a training sample follow from (seed, position, copy) alone.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from scalevit.data.images import UndecodableImage, decode
from scalevit.data.index import Index, Shard
from scalevit.data.seeding import preserved_random_state, seed_sample
from scalevit.errors import UserError

Transform = Callable[[Image.Image], torch.Tensor]


class ShardDataset(Dataset[tuple[torch.Tensor, int]]):
    """The samples of an index, map-style.

    Args:
        index: of the shards.
        transform: from an RGB image to a tensor; what it raises is a bug and is never counted as a bad image.
        seed: of the augmentation.
    """

    def __init__(self, index: Index, transform: Transform, seed: int = 0) -> None:
        self.index = index
        self.transform = transform
        self.seed = seed
        self._files = _ShardFiles(index.shards)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, sample: int) -> tuple[torch.Tensor, int]:
        """Image and label of a sample, augmented as the first copy at order position `sample`."""
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        return self.copies(sample, sample, [0])[0], int(self.index.label[sample])

    def copies(self, sample: int, position: int, copies: Sequence[int]) -> list[torch.Tensor]:
        """Augmented copies of one decoded image; the generators of this process are left as they were.

        Args:
            sample: number in the index.
            position: where the order shows it, which seeds the augmentation.
            copies: numbers of the copies.

        Returns:
            one tensor per copy, of the transform's shape.

        Raises:
            UserError: the image cannot be read or decoded.
        """
        image = self._decode(sample)
        tensors = []
        with preserved_random_state():
            for copy in copies:
                seed_sample(self.seed, position, copy)
                tensors.append(self.transform(image))
        return tensors

    def _decode(self, sample: int) -> Image.Image:
        # The one place where a bad image comes to light: what becomes of it is decided here.
        try:
            return decode(self.read(sample))
        except UndecodableImage as error:
            raise UserError(f"{self.index.describe(sample)}: the image cannot be decoded ({error})") from None

    def read(self, sample: int) -> bytes:
        """The encoded image of a sample, as it is in the shard.

        Raises:
            UserError: the shard is gone, changed or unreadable.
        """
        index = self.index
        return self._files.read(int(index.shard[sample]), int(index.offset[sample]), int(index.size[sample]))


class _ShardFiles:
    """Open shards of this process; at most so many at once, so that a set of many shards fits the system's limit."""

    _LIMIT = 128

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes:
        path = self._shards[number].path
        try:
            payload = os.pread(self._descriptor(number), size, offset)
        except OSError as error:
            raise UserError(f"shard {path}, offset {offset}: cannot be read ({error.strerror})") from None
        if len(payload) != size:
            raise UserError(f"shard {path}, offset {offset}: {len(payload)} of {size} bytes could be read")
        return payload

    def _descriptor(self, number: int) -> int:
        if number in self._descriptors:
            self._descriptors.move_to_end(number)
            return self._descriptors[number]
        if len(self._descriptors) >= self._LIMIT:
            os.close(self._descriptors.popitem(last=False)[1])
        shard = self._shards[number]
        descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors[number] = descriptor
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.modified):
            raise UserError(f"shard {shard.path}: changed since it was indexed; start again")
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"_shards": self._shards, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
