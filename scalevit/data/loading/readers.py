"""The bytes of samples, from the shards of an index. Knows indexes and files; must not know images or ranks."""

import os
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np

from scalevit.data.shards.discovery import Shard
from scalevit.data.shards.index import Index
from scalevit.data.storage.files import is_remote
from scalevit.errors import UserError


class BadRead(Exception):
    """The bytes of one sample cannot be had, though its shard can be opened; the message is the reason."""


class Reader(Protocol):
    """Reads samples of one index; a copy goes to each worker."""

    def read(self, sample: int) -> bytes:
        """The encoded image of a sample.

        Raises:
            BadRead: this sample's bytes cannot be had.
            UserError: the shard is gone, changed or out of reach.
        """
        ...

    def announce(self, samples: np.ndarray) -> None:
        """Says what will be read soon, so that it can be fetched meanwhile."""
        ...


def open_reader(index: Index, *, cache: str | None = None, cache_bytes: int | None = None) -> Reader:
    """The reader that fits where the shards are.

    Args:
        index: of the shards.
        cache: folder on this machine for chunks of shards that are elsewhere, None to fetch each sample by itself.
        cache_bytes: most bytes in that folder, None for no limit.

    Raises:
        UserError: the folder cannot be written.
    """
    if not is_remote(index.shards[0].path):
        return LocalReader(index)
    from scalevit.data.loading.chunk_cache import CachedReader, DirectReader

    return DirectReader(index) if cache is None else CachedReader(index, cache, cache_bytes)


class LocalReader:
    """`pread` from open shards of this process; at most so many at once, so that a set of many shards fits the
    system's limit.
    """

    _LIMIT = 128

    def __init__(self, index: Index) -> None:
        self._index = index
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, sample: int) -> bytes:
        index = self._index
        number, offset, size = int(index.shard[sample]), int(index.offset[sample]), int(index.size[sample])
        descriptor = self._descriptor(number, index.shards[number])
        try:
            payload = os.pread(descriptor, size, offset)
        except OSError as error:
            raise BadRead(f"the image cannot be read ({error.strerror})") from None
        if len(payload) != size:
            raise BadRead(f"{len(payload)} of the image's {size} bytes could be read")
        return payload

    def announce(self, samples: np.ndarray) -> None:
        """The system's own read-ahead does."""

    def _descriptor(self, number: int, shard: Shard) -> int:
        if number in self._descriptors:
            self._descriptors.move_to_end(number)
            return self._descriptors[number]
        if len(self._descriptors) >= self._LIMIT:
            os.close(self._descriptors.popitem(last=False)[1])
        try:
            descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"shard {shard.path}: cannot be read ({error.strerror})") from None
        self._descriptors[number] = descriptor
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.modified):
            raise UserError(f"shard {shard.path}: changed since it was indexed; start again")
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"_index": self._index, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
