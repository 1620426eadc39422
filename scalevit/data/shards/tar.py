"""Walking the headers of a tar file, with every header checked.

Python's tarfile and webdataset treat a damaged header as the end of the archive and drop the rest without a message.
Here every header must have a valid checksum, every member all of its bytes, and the archive its end mark. Members that
no data set needs (links, devices, names outside their folder) are returned with the reason to refuse them. Knows bytes;
must not know what the members mean.
"""

from collections.abc import Iterator
from typing import NamedTuple

from scalevit.data.storage.files import ShardFile

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_REGULAR, _LINKS = b"0\07", b"12"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _FOLDER = b"L", b"K", b"x", b"g", b"5"
_MAX_EXTENSION_BYTES = 1 << 20
MAX_MEMBER_BYTES = 1 << 30


class BrokenTar(Exception):
    """The chain of headers is broken, so the members after it cannot be found.

    Args:
        offset: bytes from the start of the tar to the broken header.
        reason: for messages.
    """

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset, self.reason = offset, reason

    def __str__(self) -> str:
        return f"offset {self.offset}: {self.reason}"


class Member(NamedTuple):
    """A member of a tar: a file, a link or a device."""

    name: str
    offset: int
    """Bytes from the start of the tar to the content."""
    size: int
    """Bytes."""
    start: bytes
    """The first bytes of the content, up to 512."""
    refused: str = ""
    """Why it must not be used; empty for a regular file with a valid name."""

    @property
    def key_and_extension(self) -> tuple[str, str]:
        """Split as webdataset does, at the first dot of the last part of the name. Either may be empty."""
        folder, slash, name = self.name.rpartition("/")
        stem, _, extension = name.partition(".")
        return folder + slash + stem, extension.lower()


def members(file: ShardFile, *, start: int = 0) -> Iterator[Member]:
    """The members of a tar except folders, in the order of the file.

    Args:
        file: the tar.
        start: offset of the first header to read.

    Raises:
        BrokenTar: the tar is truncated, compressed or damaged.
        UserError: it cannot be read.
    """
    offset = start
    long_name: str | None = None
    long_size: int | None = None
    while True:
        # A header and the first block of its content in one read: labels are that short.
        blocks = file.read(offset, 2 * _BLOCK)
        header = blocks[:_BLOCK]
        if header == _ZEROS:
            return _check_end(file, offset)
        if len(header) < _BLOCK:
            raise BrokenTar(offset, "truncated (no end-of-archive mark); write it again")
        kind = header[156:157]
        size = _size(offset, header)
        if long_size is not None:
            size = long_size
        content = offset + _BLOCK
        if content + size > file.size:
            raise BrokenTar(offset, f"truncated (a member of {size} bytes); write it again")
        if kind in (_LONG_NAME, _LONG_LINK, _PAX):
            if size > _MAX_EXTENSION_BYTES:
                raise BrokenTar(offset, f"an extended header of {size} bytes")
            extra = file.read(content, size)
            if kind == _LONG_NAME:
                long_name = extra.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == _PAX:
                records = _pax_records(offset, extra)
                long_name = records.get("path", long_name)
                long_size = _pax_size(offset, records["size"]) if "size" in records else None
        else:
            if kind not in (_FOLDER, _PAX_GLOBAL):
                name = long_name or _name(header)
                refused = _why_refused(name, kind, size)
                yield Member(name, content, size, blocks[_BLOCK : _BLOCK + size], refused)
            long_name = long_size = None
        offset = content + -(-size // _BLOCK) * _BLOCK


def next_header(file: ShardFile, offset: int) -> int | None:
    """The offset of the first valid header at `offset` or later, or None.

    Only for reports: the content of a member may contain a tar itself.
    """
    offset = -(-offset // _BLOCK) * _BLOCK
    while offset + _BLOCK <= file.size:
        window = file.read(offset, 1 << 20)
        for place in range(0, len(window) - _BLOCK + 1, _BLOCK):
            header = window[place : place + _BLOCK]
            if header[257:262] == b"ustar" or header[148:156].strip(b" \0").isdigit():
                try:
                    _size(offset + place, header)
                    return offset + place
                except BrokenTar:
                    pass
        offset += len(window) // _BLOCK * _BLOCK
    return None


def key_before(file: ShardFile, offset: int) -> str:
    """The key of the member whose content starts at an offset, for messages (long names are cut to 100 bytes)."""
    header = file.read(offset - _BLOCK, _BLOCK)
    return Member(_name(header), offset, 0, b"").key_and_extension[0]


def _why_refused(name: str, kind: bytes, size: int) -> str:
    if kind not in _REGULAR:
        return f"the member {name!r} is {'a link' if kind in _LINKS else f'of type {kind!r}'}, not a file"
    # Other tools unpack these tars, so a name must stay in its folder. (`tar` writes "./a.jpg" for a folder.)
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or "\n" in name:
        return f"the name {name!r} leaves its folder or is not printable"
    if size > MAX_MEMBER_BYTES:
        return f"the member {name!r} has {size} bytes, more than {MAX_MEMBER_BYTES}"
    return ""


def _check_end(file: ShardFile, offset: int) -> None:
    """Two blocks of zeros end an archive, and only zeros may follow; otherwise a header was lost."""
    end = offset
    while rest := file.read(end, 1 << 20):
        if rest.count(0) != len(rest):
            raise BrokenTar(offset, "broken (data after the end mark, or a lost header)")
        end += len(rest)
    if end - offset < 2 * _BLOCK:
        raise BrokenTar(offset, "truncated (half an end-of-archive mark); write it again")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    # POSIX tars store the folders of long names here; GNU tars have another magic and other fields here.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _size(offset: int, header: bytes) -> int:
    """The size of a member, after checking the header's checksum."""
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise ValueError
        if header[124] == 0x80:  # GNU's binary encoding of sizes of 8 GiB and more
            return int.from_bytes(header[125:136], "big")
        size = int(header[124:136].strip(b" \0") or b"0", 8)
        if size < 0:
            raise ValueError
        # In some tars links have the size of their target, but no content.
        return 0 if header[156:157] in _LINKS else size
    except ValueError:
        raise BrokenTar(offset, "no tar header here (broken or compressed)") from None


def _pax_size(offset: int, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise BrokenTar(offset, "broken extended header")
    return int(text)


def _pax_records(offset: int, content: bytes) -> dict[str, str]:
    """Records have the form `LENGTH KEY=VALUE\\n`; the length counts the whole record."""
    records = {}
    try:
        while content:
            length = int(content[: content.index(b" ")])
            key, _, value = content[content.index(b" ") + 1 : length - 1].partition(b"=")
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
            content = content[max(length, 1) :]
    except ValueError:
        raise BrokenTar(offset, "broken extended header") from None
    return records
