"""A folder on this machine that holds parts of remote shards, shared by all its processes.

The order shows the samples of a chunk close to each other, so a chunk is fetched once, as a whole, and removed when its
place is needed. Knows folders, locks and bytes; must not know indexes, samples or addresses.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from scalevit.errors import SettingError, UserError
from scalevit.files import TEMPORARY_SUFFIX, locked, write_whole

_THREADS = 4
_LOCKS = 256


class ChunkPart(NamedTuple):
    """The part of a chunk that is in one shard: a chunk of neighbouring samples may continue in the next shard."""

    chunk: int
    shard: int


Fetch = Callable[[ChunkPart], bytes]


class ChunkCache:
    """Parts of shards in a folder; missing ones are fetched.

    Any number of processes may share the folder; each part is fetched by one of them. Parts stay for later runs until
    their place is needed.

    Args:
        folder: on a disk of this machine.
        name: of the set, for its subfolder.
        limit: maximum number of bytes in the folder, None for no limit; the part fetched last is always kept.

    Raises:
        SettingError: `cache`, the folder, cannot be created.
    """

    def __init__(self, folder: str, name: str, limit: int | None = None) -> None:
        self._root, self._limit = Path(folder), limit
        self._folder = self._root / name
        self._start_process()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError("cache", folder, f"cannot be written ({error.strerror})") from None

    def _start_process(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._fetching: dict[ChunkPart, Future[None]] = {}

    def read(self, part: ChunkPart, offset: int, size: int, fetch: Fetch) -> bytes:
        """Bytes of a part.

        Args:
            part: to read from.
            offset: from its start.
            size: bytes to read.
            fetch: returns the whole part if it is not in the folder.

        Raises:
            UserError: the part cannot be fetched, or the folder cannot be written.
        """
        path = self._path(part)
        while True:
            # Opened for every read: the disk space of a removed file is freed only when it is closed.
            try:
                with open(path, "rb", buffering=0) as file:
                    content = os.pread(file.fileno(), size, offset)
                break
            except FileNotFoundError:
                self._fetch(part, fetch)
        with suppress(FileNotFoundError):
            os.utime(path)  # the parts used least recently are removed first
        if len(content) != size:
            raise UserError(f"chunk cache {self._root}: {path} is damaged; remove that folder")
        return content

    def prefetch(self, parts: Iterable[ChunkPart], fetch: Fetch) -> None:
        """Fetches parts in the background. Errors are ignored here: `read` fetches again and raises them."""
        for part in parts:
            known = self._fetching.get(part)
            if (known is not None and not known.done()) or self._path(part).exists():
                continue
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="prefetch")
            self._fetching = {other: future for other, future in self._fetching.items() if not future.done()}
            self._fetching[part] = self._threads.submit(self._fetch, part, fetch)

    def _path(self, part: ChunkPart) -> Path:
        return self._folder / f"{part.chunk}-{part.shard}"

    def _lock_path(self, name: str) -> Path:
        return self._root / f".lock-{name}"

    def _fetch(self, part: ChunkPart, fetch: Fetch) -> None:
        path = self._path(part)
        try:
            with locked(self._lock_path(str(hash(part) % _LOCKS))):
                if path.exists():
                    return
                write_whole(path, fetch(part), durable=False)
            self._make_room(path)
        except OSError as error:
            raise UserError(f"chunk cache {self._root}: cannot be written ({error.strerror or error})") from None

    def _make_room(self, newest: Path) -> None:
        if self._limit is None:
            return
        with locked(self._lock_path("room")):
            entries = []
            for path in self._root.glob("*/*-*"):
                if path.suffix == TEMPORARY_SUFFIX:
                    continue  # being written by another process
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

    def __getstate__(self) -> dict[str, Any]:
        """Without threads: each worker has its own."""
        return {name: getattr(self, name) for name in ("_root", "_limit", "_folder")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_process()
