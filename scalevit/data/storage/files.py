"""Bytes of files at any offset: local files, forward-only streams, and one entry for local files and addresses.

Knows files and addresses; must not know tars or samples.
"""

import os
import sys
from typing import Any, Protocol

from scalevit.data.storage import remote
from scalevit.data.storage.paths import is_remote
from scalevit.errors import UserError


class ShardFile(Protocol):
    """A shard that is open for reading at any offset."""

    path: str
    size: int
    """Bytes."""

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes starting at `offset`; fewer only at the end of the file.

        Raises:
            UserError: the shard cannot be read.
        """
        ...

    def close(self) -> None: ...


class LocalFile:
    """A file on this machine.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"shard {path}: cannot be read ({error.strerror})") from None
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        # One call reads at most 2 GiB.
        while size > 0:
            try:
                part = os.pread(self._descriptor, size, offset)
            except OSError as error:
                raise UserError(f"shard {self.path}, offset {offset}: cannot be read ({error.strerror})") from None
            if not part:
                break
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


class ForwardFile:
    """A stream of unknown size that is read once, from its beginning to its end.

    Args:
        path: for messages.
        stream: has `read(size)`.
    """

    size = sys.maxsize

    def __init__(self, path: str, stream: Any) -> None:
        self.path = path
        self._stream = stream
        self._held, self._start = b"", 0

    def read(self, offset: int, size: int) -> bytes:
        """As `ShardFile.read`, at the offset of the last read or a later one.

        Raises:
            OSError: of the stream.
        """
        assert offset >= self._start, "streams cannot be read backwards"
        while offset > self._start + len(self._held) and (part := self._stream.read(1 << 20)):
            self._held, self._start = part, self._start + len(self._held)
        parts = [self._held[offset - self._start :]]
        missing = size - len(parts[0])
        while missing > 0 and (part := self._stream.read(missing)):
            parts.append(part)
            missing -= len(part)
        self._held, self._start = b"".join(parts), offset
        return self._held[:size]

    def close(self) -> None:
        self._stream.close()


def open_shard(path: str) -> ShardFile:
    """Opens a shard for single small reads and for walks over its headers; samples are read by `loading.readers`.

    Raises:
        UserError: it cannot be opened.
    """
    return remote.RemoteFile(path) if is_remote(path) else LocalFile(path)


def read_if_present(path: str) -> bytes | None:
    """The content of a small file, or None if there is no such file.

    Raises:
        UserError: it cannot be read.
    """
    if is_remote(path):
        return remote.read_whole(path)
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def size_and_time(path: str) -> tuple[int, int]:
    """Bytes of a shard, and when it was last changed in nanoseconds since 1970 (0 for an address).

    Raises:
        UserError: it cannot be read.
    """
    if is_remote(path):
        return remote.size_of(path), 0
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"shard {path}: cannot be read ({error.strerror})") from None
    return status.st_size, status.st_mtime_ns
