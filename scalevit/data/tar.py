"""Walking the headers of a tar file, trusting nothing.

Python's tarfile and webdataset take a damaged header for the end of the archive and drop the rest in silence; here
every header must have its checksum, every member its bytes, and the archive its end mark. Knows bytes; must not know
what the members mean.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from scalevit.errors import UserError

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_REGULAR, _LINKS = b"0\07", b"12"
_LONG_NAME, _PAX, _PAX_GLOBAL, _FOLDER = b"L", b"x", b"g", b"5"


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    """Bytes from the start of the tar to the content."""
    size: int
    """Bytes."""
    start: bytes
    """The first bytes of the content, up to 512."""


def members(path: str) -> Iterator[Member]:
    """The regular files of a tar, in its order.

    Raises:
        UserError: not a whole, plain tar; names the offset.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"shard {path}: cannot be read ({error.strerror})") from None
    try:
        yield from _members(path, descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _members(path: str, descriptor: int, length: int) -> Iterator[Member]:
    offset = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        # A header and the first block of its content in one read: labels are that short.
        blocks = os.pread(descriptor, 2 * _BLOCK, offset)
        header = blocks[:_BLOCK]
        if header == _ZEROS:
            return _check_end(path, descriptor, offset, length)
        if len(header) < _BLOCK:
            raise UserError(f"shard {path}, offset {offset}: truncated (no end-of-archive mark); write it again")
        kind = header[156:157]
        size = _size(path, offset, header)
        if long_size is not None:
            size = long_size
        content = offset + _BLOCK
        if content + size > length:
            raise UserError(f"shard {path}, offset {offset}: truncated (a member of {size} bytes); write it again")
        if kind in (_LONG_NAME, _PAX):
            extra = os.pread(descriptor, size, content)
            if kind == _LONG_NAME:
                long_name = extra.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                records = _pax_records(path, offset, extra)
                long_name = records.get("path", long_name)
                long_size = int(records["size"]) if "size" in records else None
        else:
            if kind in _REGULAR:
                yield Member(long_name or _name(header), content, size, blocks[_BLOCK : _BLOCK + size])
            elif kind not in (_FOLDER, _PAX_GLOBAL):
                what = "a link" if kind in _LINKS else f"of type {kind!r}"
                raise UserError(f"shard {path}, offset {offset}: the member {_name(header)!r} is {what}, not a file")
            long_name = long_size = None
        offset = content + -(-size // _BLOCK) * _BLOCK


def key_before(path: str, offset: int) -> str:
    """The key of the member whose content starts at an offset, for messages (long names are cut to 100 bytes)."""
    with open(path, "rb") as file:
        file.seek(offset - _BLOCK)
        folder, slash, name = _name(file.read(_BLOCK)).rpartition("/")
    return folder + slash + name.partition(".")[0]


def _check_end(path: str, descriptor: int, offset: int, length: int) -> None:
    """Two blocks of zeros end an archive, and only zeros follow: else a header was lost."""
    if length - offset < 2 * _BLOCK:
        raise UserError(f"shard {path}, offset {offset}: truncated (half an end-of-archive mark); write it again")
    while offset < length:
        rest = os.pread(descriptor, 1 << 20, offset)
        if rest.count(0) != len(rest):
            raise UserError(f"shard {path}, offset {offset}: broken (data after the end mark, or a lost header)")
        offset += len(rest)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    # POSIX tars put the folders of long names elsewhere; GNU's use that place otherwise and have another magic.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _size(path: str, offset: int, header: bytes) -> int:
    """The size of a member, once the header's checksum is right."""
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise ValueError
        if header[124] == 0x80:  # GNU's binary form of sizes from 8 GiB on
            return int.from_bytes(header[125:136], "big")
        return int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise UserError(f"shard {path}, offset {offset}: no tar header here (broken or compressed)") from None


def _pax_records(path: str, offset: int, content: bytes) -> dict[str, str]:
    """Records read `LENGTH KEY=VALUE\\n`, the length counting all of it."""
    records = {}
    try:
        while content:
            length = int(content[: content.index(b" ")])
            key, _, value = content[content.index(b" ") + 1 : length - 1].partition(b"=")
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
            content = content[max(length, 1) :]
    except ValueError:
        raise UserError(f"shard {path}, offset {offset}: broken extended header") from None
    return records
