"""Files at addresses (s3, gs, http, memory, ...), by fsspec: listing, sizes and ranges, with retries.

fsspec and what it needs for an address are imported when first used. Knows addresses and bytes; must not know samples.
"""

import random
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from scalevit.errors import UserError

T = TypeVar("T")

ATTEMPTS = 5
# Doubled after each attempt, and spread, so that the ranks of a run do not come back at once.
FIRST_DELAY_SECONDS = 0.5
_MOST_BYTES_PER_READ = 16 << 20
_BLOCK = 8 << 20


@lru_cache(maxsize=64)
def _filesystem(protocol: str) -> Any:
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{protocol}://: reading it needs the package fsspec; pip install fsspec") from None
    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:  # it says which package the protocol needs
        raise UserError(f"{protocol}://: cannot be read ({' '.join(str(error).split())})") from None


def _at(address: str) -> Any:
    return _filesystem(address.partition("://")[0])


def with_retries(action: Callable[[], T], address: str) -> T:
    """What the action returns, tried several times while the network fails.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: access is denied, or the last attempt failed too.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, UserError):
            raise
        except PermissionError as error:
            raise UserError(f"{address}: access denied ({' '.join(str(error).split())})") from None
        except Exception as error:  # each protocol has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            if attempt == ATTEMPTS - 1:
                raise UserError(f"{address}: cannot be read, tried {ATTEMPTS} times ({reason})") from None
        time.sleep(FIRST_DELAY_SECONDS * 2**attempt * random.Random().uniform(0.75, 1.25))
    raise AssertionError


def size_of(address: str) -> int:
    """Bytes of a file.

    Raises:
        UserError: it is missing, or its size is not told.
    """
    try:
        size = with_retries(lambda: _at(address).info(address)["size"], address)
    except FileNotFoundError:
        raise UserError(f"shard {address}: no such file") from None
    if size is None:
        raise UserError(f"shard {address}: the server tells no size; set data.stream_samples_per_epoch to stream it")
    return int(size)


def read_whole(address: str) -> bytes | None:
    """A small file, or None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return with_retries(lambda: _at(address).cat_file(address), address)
    except FileNotFoundError:
        return None


def read_range(address: str, start: int, end: int) -> bytes:
    """The bytes from `start` up to `end`, by as many requests as their number asks for.

    Raises:
        UserError: it cannot be read, or the server does not give ranges.
    """

    def read(first: int, last: int) -> bytes:
        content = _at(address).cat_file(address, start=first, end=last)
        if len(content) > last - first:
            raise UserError(f"{address}: the server gives no ranges; set data.stream_samples_per_epoch to stream it")
        if len(content) < last - first:
            raise OSError(f"{len(content)} of {last - first} bytes came")
        return content

    parts = []
    for first in range(start, end, _MOST_BYTES_PER_READ):
        last = min(first + _MOST_BYTES_PER_READ, end)
        try:
            parts.append(with_retries(lambda first=first, last=last: read(first, last), address))  # type: ignore[misc]
        except FileNotFoundError:
            raise UserError(f"shard {address}: no such file") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


class RemoteFile:
    """A `storage.ShardFile` at an address, made for walks: it reads ahead by blocks."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = size_of(path)
        self._start, self._block = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        size = max(0, min(size, self.size - offset))
        if not self._start <= offset <= offset + size <= self._start + len(self._block):
            self._start = offset
            self._block = read_range(self.path, offset, min(self.size, offset + max(size, _BLOCK)))
        place = offset - self._start
        return self._block[place : place + size]

    def close(self) -> None:
        self._block = b""


def find_remote_shards(pattern: str) -> list[str]:
    """The tar files of a folder, of a glob, or of `{000..146}` braces.

    A folder is listed by its `set.json` where it has one, so that servers need not list it.

    Raises:
        UserError: none there, or a folder that differs from its `set.json`.
    """
    from scalevit.data.shards.discovery import SET_FILE, check_names, expand_braces

    if not any(sign in pattern for sign in "{*?[") and not pattern.endswith(".tar"):
        folder = pattern.rstrip("/")
        description = read_whole(f"{folder}/{SET_FILE}")
        found = _listed(f"{folder}/*.tar")
        if description is not None and found is not None:
            check_names(folder, description, found)
        elif description is not None:
            import json

            found = [f"{folder}/{name}" for name in json.loads(description)["shards"]]
    else:
        found = []
        for name in expand_braces(pattern):
            found += (_listed(name) or []) if any(sign in name for sign in "*?[") else [name]
    if not found:
        raise UserError(f"no shards at {pattern}: name a folder of .tar files, a glob, or {{000..146}} braces")
    return found


def _listed(pattern: str) -> list[str] | None:
    """Addresses that match, sorted; None where the server cannot list."""
    filesystem = _at(pattern)
    try:
        found = with_retries(lambda: filesystem.glob(pattern), pattern)
    except (FileNotFoundError, NotImplementedError):
        return None
    folder = pattern.rpartition("/")[0]
    if any(sign in folder for sign in "*?["):
        return [filesystem.unstrip_protocol(path) for path in sorted(found)] or None
    # In the user's own words, which messages repeat.
    return [f"{folder}/{path.rpartition('/')[2]}" for path in sorted(found)] or None
