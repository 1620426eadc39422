"""Files at addresses (s3, gs, http, memory, ...) through fsspec: listing, sizes and byte ranges, with retries.

fsspec and the packages that an address needs are imported when first used. Knows addresses and bytes; must not know
samples.
"""

import random
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeVar

from scalevit.data.storage.paths import StreamOnlyError, file_name, has_wildcard
from scalevit.errors import UserError, install_hint, require

T = TypeVar("T")

ATTEMPTS = 5
# Doubled after each attempt, and randomised so that the ranks of a run do not retry at the same moment.
FIRST_DELAY_SECONDS = 0.5
_MAX_BYTES_PER_READ = 16 << 20
_BLOCK = 8 << 20
# By protocol: the extra of scalevit that installs its packages.
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}


@lru_cache(maxsize=64)
def _filesystem(protocol: str) -> Any:
    extra = _EXTRAS.get(protocol)
    require("fsspec", extra=extra or "http")
    import fsspec

    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:  # the message names the package that the protocol needs
        reason = " ".join(str(error).split())
        install = f"; {install_hint(extra)}" if extra and isinstance(error, ImportError) else ""
        raise UserError(f"{protocol}://: cannot be read ({reason}){install}") from None


def _filesystem_of(address: str) -> Any:
    return _filesystem(address.partition("://")[0])


def with_retries(action: Callable[[], T], address: str) -> T:
    """Returns the action's result, repeating the action while the network fails.

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
        except Exception as error:  # every protocol raises its own classes
            reason = " ".join(str(error).split()) or type(error).__name__
            if attempt == ATTEMPTS - 1:
                raise UserError(f"{address}: cannot be read, tried {ATTEMPTS} times ({reason})") from None
        time.sleep(FIRST_DELAY_SECONDS * 2**attempt * random.Random().uniform(0.75, 1.25))
    raise AssertionError


def size_of(address: str) -> int:
    """Bytes of a shard.

    Raises:
        StreamOnlyError: the server does not report its size.
        UserError: it is missing or cannot be read.
    """
    try:
        size = with_retries(lambda: _filesystem_of(address).info(address)["size"], address)
    except FileNotFoundError:
        raise UserError(f"shard {address}: no such file") from None
    if size is None:
        raise StreamOnlyError(f"shard {address}: the server does not report its size, so it can only be streamed")
    return int(size)


def read_whole(address: str) -> bytes | None:
    """The content of a small file, or None if there is no such file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return with_retries(lambda: _filesystem_of(address).cat_file(address), address)
    except FileNotFoundError:
        return None


def read_range(address: str, start: int, end: int) -> bytes:
    """The bytes from `start` up to `end`, with one request for every 16 MiB.

    Raises:
        StreamOnlyError: the server does not support byte ranges.
        UserError: the shard is missing or cannot be read.
    """
    parts = []
    for first in range(start, end, _MAX_BYTES_PER_READ):
        last = min(first + _MAX_BYTES_PER_READ, end)
        try:
            parts.append(with_retries(partial(_request_range, address, first, last), address))
        except FileNotFoundError:
            raise UserError(f"shard {address}: no such file") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _request_range(address: str, start: int, end: int) -> bytes:
    content = _filesystem_of(address).cat_file(address, start=start, end=end)
    if len(content) > end - start:
        raise StreamOnlyError(f"shard {address}: the server does not support byte ranges, so it can only be streamed")
    if len(content) < end - start:
        raise OSError(f"received {len(content)} of {end - start} bytes")
    return content


class RemoteFile:
    """A `files.ShardFile` at an address, for walks over headers: it reads ahead by blocks of 8 MiB."""

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


def list_files(pattern: str) -> list[str] | None:
    """Addresses that match a glob pattern, sorted; None if nothing matches or the server cannot list.

    Raises:
        UserError: the listing fails.
    """
    filesystem = _filesystem_of(pattern)
    try:
        found = with_retries(lambda: filesystem.glob(pattern), pattern)
    except (FileNotFoundError, NotImplementedError):
        return None
    folder = pattern.rpartition("/")[0]
    if has_wildcard(folder):
        return [filesystem.unstrip_protocol(path) for path in sorted(found)] or None
    # With the user's own spelling of the folder, which messages repeat.
    return [f"{folder}/{file_name(path)}" for path in sorted(found)] or None
