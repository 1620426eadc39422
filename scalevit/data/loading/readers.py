"""The bytes of samples, from the shards of an index: on local disks, at addresses, or through a cache.

Knows indexes, files and addresses; must not know images or ranks.
"""

import hashlib
import os
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np

from scalevit.data.loading.chunk_cache import ChunkCache, ChunkPart
from scalevit.data.order.shuffle import CHUNK
from scalevit.data.shards.discovery import Shard
from scalevit.data.shards.index import Index
from scalevit.data.storage import remote
from scalevit.data.storage.paths import is_remote
from scalevit.errors import UserError


class SampleReadError(Exception):
    """The bytes of one sample cannot be read, though its shard can be opened; the message is the reason."""


class Reader(Protocol):
    """Reads samples of one index; each worker has a copy."""

    def read(self, sample: int) -> bytes:
        """The encoded image of a sample.

        Raises:
            SampleReadError: this sample's bytes cannot be read.
            UserError: the shard is missing, changed or cannot be reached.
        """
        ...

    def prefetch(self, samples: np.ndarray) -> None:
        """Announces samples that will be read soon, so that they can be fetched in the background."""
        ...


def open_reader(index: Index, *, cache: str | None = None, cache_bytes: int | None = None) -> Reader:
    """The reader for the place where the shards are.

    Args:
        index: of the shards.
        cache: folder on this machine for chunks of remote shards; None fetches each sample separately.
        cache_bytes: maximum number of bytes in that folder, None for no limit.

    Raises:
        SettingError: `cache` cannot be written.
    """
    if not is_remote(index.shards[0].path):
        return LocalReader(index)
    return RemoteReader(index) if cache is None else CachedReader(index, cache, cache_bytes)


class LocalReader:
    """`pread` from shards that stay open, up to a limit, so that sets of many shards do not exceed the system's."""

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
            raise SampleReadError(f"the image cannot be read ({error.strerror})") from None
        if len(payload) != size:
            raise SampleReadError(f"{len(payload)} of the image's {size} bytes could be read")
        return payload

    def prefetch(self, samples: np.ndarray) -> None:
        """Left to the operating system's read-ahead."""

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
        """Without descriptors: each worker opens its own."""
        return {"_index": self._index, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class RemoteReader:
    """One byte range per sample, without a cache: for sets that are read once."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def read(self, sample: int) -> bytes:
        index = self._index
        start = int(index.offset[sample])
        return remote.read_range(index.shards[index.shard[sample]].path, start, start + int(index.size[sample]))

    def prefetch(self, samples: np.ndarray) -> None:
        """Nothing is fetched ahead."""


class CachedReader:
    """Samples of remote shards through a `ChunkCache`: whole chunks are fetched and kept.

    Args:
        index: of the shards.
        folder: of the cache.
        limit: maximum number of bytes in it, None for no limit.

    Raises:
        SettingError: `cache`, the folder, cannot be written.
    """

    def __init__(self, index: Index, folder: str, limit: int | None = None) -> None:
        self._index = index
        shards = "\n".join(f"{shard.path} {shard.size}" for shard in index.shards)
        name = hashlib.sha256(f"{index.fingerprint}\n{shards}".encode()).hexdigest()[:16]
        self._cache = ChunkCache(folder, name, limit)

    def read(self, sample: int) -> bytes:
        part = self._part(sample)
        start, _ = self._extent(part)
        size = int(self._index.size[sample])
        return self._cache.read(part, int(self._index.offset[sample]) - start, size, self._fetch)

    def prefetch(self, samples: np.ndarray) -> None:
        self._cache.prefetch({self._part(int(sample)) for sample in samples}, self._fetch)

    def _part(self, sample: int) -> ChunkPart:
        return ChunkPart(sample // CHUNK, int(self._index.shard[sample]))

    def _extent(self, part: ChunkPart) -> tuple[int, int]:
        """Byte range of a part in its shard, from the first image to the end of the last."""
        index, first = self._index, part.chunk * CHUNK
        samples = first + np.flatnonzero(index.shard[first : first + CHUNK] == part.shard)
        return int(index.offset[samples].min()), int((index.offset[samples] + index.size[samples]).max())

    def _fetch(self, part: ChunkPart) -> bytes:
        return remote.read_range(self._index.shards[part.shard].path, *self._extent(part))
