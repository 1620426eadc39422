"""Bytes of shards at an offset, wherever they are. Knows files and addresses; must not know tars or samples."""

import os
import sys
from typing import Any, Protocol

from scalevit.errors import UserError


class ShardFile(Protocol):
    """A shard open for reading at any offset."""

    path: str
    size: int
    """Bytes."""

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; fewer only at the end.

        Raises:
            UserError: the shard cannot be read.
        """
        ...

    def close(self) -> None: ...


class LocalFile:
    """A file of this machine.

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
        status = os.fstat(self._descriptor)
        self.size, self.modified = status.st_size, status.st_mtime_ns

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
    """A stream as a shard whose size is not known and which is read from its beginning to its end.

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
        """As for other shards, from where the last read began or later.

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


def is_remote(path: str) -> bool:
    """Whether it is an address (s3://, gs://, http://, memory://, ...) and not a path."""
    return "://" in path


def open_shard(path: str) -> ShardFile:
    """Opens a shard for single small reads and for walks over its headers (samples are read by `reading`).

    Raises:
        UserError: it cannot be opened.
    """
    if is_remote(path):
        from scalevit.data.storage.remote import RemoteFile

        return RemoteFile(path)
    return LocalFile(path)


def read_beside(path: str, extension: str) -> bytes | None:
    """The file that stands beside a shard under another extension, or None where there is none."""
    beside = path.rpartition(".tar")[0] + extension
    if is_remote(path):
        from scalevit.data.storage.remote import read_whole

        return read_whole(beside)
    try:
        with open(beside, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{beside}: cannot be read ({error.strerror})") from None
