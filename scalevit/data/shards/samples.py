"""The samples of one shard: the members of its tar, grouped as webdataset groups them, each checked.

Every sample becomes either an `IndexedSample` or a `Fault`; none is dropped without a report. Knows tars and labels;
must not decode images.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scalevit.data.faults import Fault
from scalevit.data.images import KINDS
from scalevit.data.shards import tar
from scalevit.data.shards.labels import EXTENSIONS, INTEGERS, LabelFormat, NoLabel
from scalevit.data.storage.files import ShardFile, read_if_present
from scalevit.data.storage.paths import beside
from scalevit.errors import UserError


class IndexedSample(NamedTuple):
    """A usable sample."""

    key: str
    offset: int
    """Bytes from the start of the shard to the image."""
    size: int
    """Bytes of the image."""
    kind: int
    """Number in `images.KINDS`."""
    label: int


@dataclass
class Scan:
    """The result of a walk over a shard."""

    samples: list[IndexedSample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    """Samples that cannot be used, but do not end the walk."""
    header_errors: list[tar.BrokenTar] = field(default_factory=list)
    """Where the chain of headers is broken."""

    @property
    def count(self) -> int:
        """Samples, usable or not."""
        return len(self.samples) + len(self.faults)


class ShardMetadata(NamedTuple):
    """The JSON file that the writer puts beside a shard; see docs/data.md."""

    samples: int
    size: int
    sha256: str
    classes: dict[int, int]
    """Images per label."""
    crc32: list[int]
    """Of each image, in the order of the shard; empty if unknown."""


def scan_shard(file: ShardFile, labels: LabelFormat = INTEGERS, *, skip_broken: bool = False) -> Scan:
    """Walks all headers of a shard.

    Args:
        file: the shard.
        labels: how they are written.
        skip_broken: continue at the next valid header after a broken one, for reports; otherwise the walk ends there.

    Raises:
        UserError: the shard cannot be read.
    """
    scan = Scan()
    grouping = _Grouping(file, labels, scan)
    start: int | None = 0
    while start is not None:
        try:
            for member in tar.members(file, start=start):
                grouping.take(member)
            start = None
        except tar.BrokenTar as broken:
            scan.header_errors.append(broken)
            start = tar.next_header(file, broken.offset + 1) if skip_broken else None
    grouping.complete()
    return scan


def read_shard_metadata(path: str) -> ShardMetadata | None:
    """The metadata that our writer stored beside a shard; None for shards of other tools.

    Raises:
        UserError: the file exists and is damaged.
    """
    content = read_if_present(beside(path, ".json"))
    if content is None:
        return None
    try:
        about: Any = json.loads(content)
        if not isinstance(about, dict) or not {"count", "size", "sha256"} <= about.keys():
            return None  # another tool's
        checksums = about.get("payload_crc32", "")
        return ShardMetadata(
            int(about["count"]),
            int(about["size"]),
            str(about["sha256"]),
            {int(label): int(count) for label, count in about.get("classes", {}).items()},
            [int(checksums[place : place + 8], 16) for place in range(0, len(checksums), 8)],
        )
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{beside(path, '.json')}: is damaged; remove it to read the shard without checksums") from None


class _Grouping:
    """Groups members into samples as webdataset does: neighbours whose names agree up to the first dot of the last
    part. Members with other extensions are further fields of the sample, which are not read here.
    """

    def __init__(self, file: ShardFile, labels: LabelFormat, scan: Scan) -> None:
        self._file, self._format, self._scan = file, labels, scan
        self._seen: set[str] = set()
        self._current: str | None = None
        self._start()

    def _start(self) -> None:
        self._offset = -1
        self._image: tuple[int, int, int] | None = None
        self._labels: dict[str, Callable[[], bytes]] = {}
        self._reason = ""

    def take(self, member: tar.Member) -> None:
        """Adds a member to the current sample, or completes that sample and starts the next."""
        key, extension = member.key_and_extension
        name = key.rpartition("/")[2]
        nameless = not name or not extension or (name.startswith("__") and name.endswith("__"))
        if nameless and not member.refused:
            return  # webdataset's own rule: not part of any sample
        if key != self._current:
            self.complete()
            self._start()
            self._current = key
            self._offset = member.offset
            if key in self._seen:
                self._reason = f"the key {key!r} occurs a second time"
            self._seen.add(key)
        if member.refused:
            self._reason = self._reason or member.refused
        elif extension in KINDS:
            if self._image is not None:
                self._reason = self._reason or f"the key {key!r} has two images"
            else:
                self._image = (member.offset, member.size, KINDS.index(extension))
        elif extension in EXTENSIONS:
            if extension in self._labels:
                self._reason = self._reason or f"the key {key!r} has two members .{extension}"
            self._labels[extension] = lambda: self._content(member)

    def complete(self) -> None:
        """Checks the sample whose members have all been seen, and adds it to the scan."""
        key = self._current
        if key is None:
            return
        self._current = None
        offset = self._image[0] if self._image else self._offset
        if not self._reason and self._image is None:
            self._reason = f"no .{', .'.join(KINDS)} member"
        if not self._reason:
            try:
                label = self._format.find(self._labels)
            except NoLabel as error:
                self._reason = str(error)
        if self._reason:
            self._scan.faults.append(Fault(self._file.path, key, offset, self._reason))
        else:
            assert self._image is not None
            self._scan.samples.append(IndexedSample(key, *self._image, label))

    def _content(self, member: tar.Member) -> bytes:
        if member.size <= len(member.start):
            return member.start
        return self._file.read(member.offset, min(member.size, 1 << 20))
