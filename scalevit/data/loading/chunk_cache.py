"""Samples of shards that are elsewhere: fetched by chunks into a folder of this machine that all its ranks share.

The order shows the samples of a chunk near one another, so a chunk is fetched once, whole, with few requests, and
dropped when others need its place. Knows indexes, addresses and files; must not know images or ranks.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from scalevit.data.order.shuffle import CHUNK
from scalevit.data.shards.index import Index
from scalevit.data.storage import remote
from scalevit.errors import UserError

_THREADS = 4
_LOCKS = 256

# (chunk, shard): the part of a chunk that lies in one shard
Piece = tuple[int, int]


class DirectReader:
    """One range per sample, without a cache: for sets that are read once."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def read(self, sample: int) -> bytes:
        index = self._index
        start = int(index.offset[sample])
        return remote.read_range(index.shards[index.shard[sample]].path, start, start + int(index.size[sample]))

    def announce(self, samples: np.ndarray) -> None:
        """Nothing is fetched ahead."""


class CachedReader:
    """Reads samples from chunks in a folder, fetching those that are missing.

    Any number of processes may share the folder; each chunk is fetched by one of them. What is fetched stays for the
    next run, until its place is needed.

    Args:
        index: of the shards.
        folder: on a disk of this machine.
        limit: most bytes in the folder, None for no limit; the chunk last fetched stays in any case.
    """

    def __init__(self, index: Index, folder: str, limit: int | None = None) -> None:
        self._index, self._root, self._limit = index, Path(folder), limit
        where = "\n".join(f"{shard.path} {shard.size}" for shard in index.shards)
        name = hashlib.sha256(f"{index.fingerprint}\n{where}".encode()).hexdigest()[:16]
        self._folder = self._root / name
        self._start_process()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache = {folder}: cannot be written ({error.strerror})") from None

    def _start_process(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._fetching: dict[Piece, Future[None]] = {}

    def read(self, sample: int) -> bytes:
        """The encoded image of a sample.

        Raises:
            UserError: the shard cannot be fetched, or the folder not be written.
        """
        piece = sample // CHUNK, int(self._index.shard[sample])
        start = int(self._index.offset[sample]) - self._extent(piece)[0]
        size, path = int(self._index.size[sample]), self._path(piece)
        while True:
            # Opened anew each time: a file that is kept open keeps its place on the disk after it was dropped.
            try:
                with open(path, "rb", buffering=0) as file:
                    payload = os.pread(file.fileno(), size, start)
                break
            except FileNotFoundError:
                self._fetch(piece)
        with suppress(FileNotFoundError):
            os.utime(path)  # those used last stay longest
        if len(payload) != size:
            raise UserError(f"data.cache = {self._root}: {path} is damaged; remove that folder")
        return payload

    def announce(self, samples: np.ndarray) -> None:
        """Fetches the chunks of samples in the background. What fails is tried again, and told, when it is read."""
        for piece in {(int(sample) // CHUNK, int(self._index.shard[sample])) for sample in samples}:
            known = self._fetching.get(piece)
            if (known is not None and not known.done()) or self._path(piece).exists():
                continue
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="read-ahead")
            self._fetching = {other: future for other, future in self._fetching.items() if not future.done()}
            self._fetching[piece] = self._threads.submit(self._fetch, piece)

    # --- pieces ---------------------------------------------------------------------------------------------

    def _path(self, piece: Piece) -> Path:
        return self._folder / f"{piece[0]}-{piece[1]}"

    def _extent(self, piece: Piece) -> tuple[int, int]:
        """Bytes of its shard, from the first image to the end of the last."""
        index, first = self._index, piece[0] * CHUNK
        samples = first + np.flatnonzero(index.shard[first : first + CHUNK] == piece[1])
        return int(index.offset[samples].min()), int((index.offset[samples] + index.size[samples]).max())

    def _fetch(self, piece: Piece) -> None:
        path = self._path(piece)
        try:
            with self._lock(str(hash(piece) % _LOCKS)):
                if path.exists():
                    return
                content = remote.read_range(self._index.shards[piece[1]].path, *self._extent(piece))
                temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
                try:
                    temporary.write_bytes(content)
                    os.rename(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
            self._make_room(path)
        except OSError as error:
            raise UserError(f"data.cache = {self._root}: cannot be written ({error.strerror or error})") from None

    def _make_room(self, newest: Path) -> None:
        if self._limit is None:
            return
        with self._lock("room"):
            entries = []
            for path in self._root.glob("*/*-*"):
                if path.suffix == ".tmp":
                    continue  # being written by another
                with suppress(FileNotFoundError):
                    status = path.stat()
                    entries.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in entries)
            for _, size, path in sorted(entries):
                if total <= self._limit:
                    break
                if path != newest:
                    path.unlink(missing_ok=True)
                    total -= size

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Between processes and threads of this machine; gone with its holder."""
        descriptor = os.open(self._root / f".lock-{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_index", "_root", "_limit", "_folder")
        return {name: value for name, value in self.__dict__.items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_process()
