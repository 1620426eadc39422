"""Files that are complete or absent, whenever a process is killed or a machine loses power; locks; checksums.

The one way to write a file, to lock one and to compute its checksum. Knows only paths and bytes.
"""

import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from scalevit.errors import UserError

TEMPORARY_SUFFIX = ".tmp"
"""Ends the names of files that are being written; what a killed process leaves under such a name can be removed."""
# How long `lock` allows for a process that only looks whether a file is locked.
_SECONDS_OF_A_LOOK = 0.1


class Digest(NamedTuple):
    """Size and checksum of a file."""

    bytes: int
    sha256: str


@contextmanager
def writing_whole(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the same folder; when the block ends, flushes it to disk and renames it to `path`.

    If the block fails, the temporary file is removed and `path` stays as it was.

    Args:
        durable: whether to flush. Without, the file is complete or absent after a killed process, but not after a loss
            of power: for caches, whose files can be made again.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = _temporary_name(path)
    try:
        yield temporary
        if durable:
            fsync_path(temporary)
        temporary.replace(path)
        if durable:
            fsync_path(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def check_writable(path: Path) -> None:
    """Makes sure that a file or folder can be made under this name, before the work that it is for.

    Raises:
        UserError: it cannot.
    """
    temporary = _temporary_name(path)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def check_new(path: Path, *, folder: bool = False) -> None:
    """Makes sure that a new file can be made under this name, before the work that it is for. Nothing is replaced.

    Args:
        folder: a folder shall be made; it may exist if it is empty.

    Raises:
        UserError: it exists, or cannot be made.
    """
    if folder and path.is_file():
        raise UserError(f"{path}: is a file, not a folder")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.parent}: no such folder")
    is_empty = folder and path.is_dir() and not any(path.iterdir())
    if os.path.lexists(path) and not is_empty:
        raise UserError(f"{path}: already exists; choose another name")
    check_writable(path)


def write_whole(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replaces a file by new content in one step; `durable` as for `writing_whole`.

    Raises:
        OSError: the file cannot be written; the old content stays.
    """
    with writing_whole(path, durable=durable) as temporary:
        temporary.write_bytes(content)


def fsync_path(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path, *, wait: bool) -> BinaryIO:
    """Locks a file, which is created if needed, until the returned file is closed or the process ends.

    Locks exclude other processes and other threads, on the same machine and, on Linux, over NFS. The file stays:
    removing it would race with whoever opens it next.

    Args:
        wait: wait for the present holder, else fail at once.

    Raises:
        BlockingIOError: another process or thread holds it (only without `wait`).
        OSError: the file cannot be opened. A file system without locks counts as unlocked.
    """
    file = path.open("ab")
    try:
        if wait:
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            _lock_now(file)
    except BlockingIOError:
        file.close()
        raise
    except OSError:
        pass  # a file system without locks: nobody can hold one
    return file


def _lock_now(file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(_SECONDS_OF_A_LOOK)  # it may be `is_locked` that holds it
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(path: Path) -> bool | None:
    """Whether another process or thread holds `lock(path)`; None where the file system cannot say.

    Nothing is created or changed. It holds a shared lock for an instant, which `lock` allows for.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    return False


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds `lock(path)` while the block runs."""
    file = lock(path, wait=wait)
    try:
        yield
    finally:
        file.close()


def digest(path: Path) -> Digest:
    """Size and SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    sha256 = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            size += len(block)
    return Digest(size, sha256.hexdigest())
