"""The index of the samples in a set of shards.

It has the shard, offset and size of each image and its label, so that any sample takes one read. It is built by a walk
over the tar headers, saved beside the shards, and reused while their names, sizes and times are unchanged. docs/data.md
describes the format. Knows files and numpy; must not know ranks or torch.
"""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path

import numpy as np

from scalevit.data.faults import Fault
from scalevit.data.images import KINDS
from scalevit.data.shards import tar
from scalevit.data.shards.discovery import Shard, class_names, find_shards, stat_shard
from scalevit.data.shards.labels import INTEGERS, LabelFormat
from scalevit.data.shards.samples import Scan, ShardMetadata, read_shard_metadata, scan_shard
from scalevit.data.storage import remote
from scalevit.data.storage.files import open_shard
from scalevit.data.storage.paths import file_name, is_remote
from scalevit.errors import SettingError, UserError, nearest_hint
from scalevit.files import writing_whole

_FORMAT = 2
# The columns that decide which sample an order position refers to.
_PLACES = {"shard": np.int32, "offset": np.int64, "size": np.int64, "kind": np.uint8, "label": np.int64}
_ARRAYS = {**_PLACES, "crc32": np.int64}


@dataclass(frozen=True)
class Index:
    """The place of each usable sample. All arrays are (N,), in the order of the shards and of the samples in them."""

    shards: tuple[Shard, ...]
    shard: np.ndarray
    """int32, number in `shards`."""
    offset: np.ndarray
    """int64, bytes from the start of the shard to the image."""
    size: np.ndarray
    """int64, bytes of the image."""
    kind: np.ndarray
    """uint8, number in `images.KINDS`."""
    label: np.ndarray
    """int64."""
    crc32: np.ndarray
    """int64, checksum of the image's bytes, -1 if unknown."""
    faults: tuple[Fault, ...] = ()
    """Samples of the shards that are not in the index because they cannot be used."""
    classes: tuple[str, ...] | None = None
    """Names of labels 0..., where the set has them."""

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the places, sizes and labels of all samples; names and times of the shards do not matter."""
        digest = hashlib.sha256(b"index 1")
        for name, kind in _PLACES.items():
            digest.update(getattr(self, name).astype(np.dtype(kind).newbyteorder("<")).tobytes())
        return digest.hexdigest()[:16]

    def key(self, sample: int) -> str:
        """The key of a sample, read from its shard."""
        with closing(open_shard(self.shards[self.shard[sample]].path)) as file:
            return tar.key_before(file, int(self.offset[sample]))

    def class_of(self, label: int) -> str:
        """The name of a label; "label 7" where it has none."""
        named = self.classes is not None and 0 <= label < len(self.classes)
        return self.classes[label] if named and self.classes else f"label {label}"

    def fault(self, sample: int, reason: str) -> Fault:
        """A `Fault` for a sample, with its shard and key."""
        try:
            key = self.key(sample)
        except UserError:
            key = "?"
        return Fault(self.shards[self.shard[sample]].path, key, int(self.offset[sample]), reason)

    def numbered_as(self, classes: Sequence[str], *, of: str = "the training set") -> "Index":
        """The same samples with the label numbers of other classes, by name.

        Args:
            classes: all different.
            of: what has these classes, for the message.

        Raises:
            UserError: this set has images of a class that is not among them.
        """
        if self.classes is None or self.classes == tuple(classes):
            return self
        numbers = {name: number for number, name in enumerate(classes)}
        mapping = np.array([numbers.get(name, -1) for name in self.classes], np.int64)
        named = (self.label >= 0) & (self.label < len(mapping))  # others are left to `check_labels`
        label = self.label.copy()
        label[named] = mapping[self.label[named]]
        unknown = np.unique(self.label[named & (label < 0)])
        if len(unknown):
            name = self.classes[unknown[0]]
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise UserError(
                f"shards at {os.path.dirname(self.shards[0].path)}: class {name!r}{more} of {len(self.classes)} is not "
                f"among the {len(classes)} classes of {of}{nearest_hint(name, classes)}"
            )
        return replace(self, label=label, classes=tuple(classes))

    def relabelled(self, labels: Mapping[str, int], where: str) -> "Index":
        """The same samples with other labels.

        Args:
            labels: new label by the name of a class, or by its old label as text; several may be the same.
            where: what holds them, for the message.

        Returns:
            The index; its classes have names if the new labels are 0, 1, ..., each of one class.

        Raises:
            UserError: this set has a class that is not among them.
        """
        own = np.unique(self.label)
        keys = {int(old): name if (name := self.class_of(int(old))) in labels else str(old) for old in own}
        missing = [self.class_of(old) for old, key in keys.items() if key not in labels]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{where}: has no label for {missing[0]!r}{more}{nearest_hint(missing[0], labels)}")
        new = np.array([labels[keys[int(old)]] for old in own], np.int64)
        by_label = {label: name for name, label in labels.items()}
        one_to_one = sorted(labels.values()) == list(range(len(labels)))
        classes = tuple(by_label[label] for label in range(len(labels))) if one_to_one else None
        return replace(self, label=new[np.searchsorted(own, self.label)], classes=classes)

    def check_labels(self, num_classes: int) -> None:
        """Checks that all labels are in 0..num_classes-1.

        Raises:
            SettingError: `num_classes`, with the first sample whose label is out of range.
        """
        wrong = np.flatnonzero((self.label < 0) | (self.label >= num_classes))
        if len(wrong):
            label = self.label[wrong[0]]
            span = f"labels go from {self.label.min()} to {self.label.max()}, of {len(np.unique(self.label))} classes"
            fault = self.fault(wrong[0], f"label {label} is not in 0..{num_classes - 1}")
            raise SettingError("num_classes", num_classes, f"{fault} ({len(wrong)} of {len(self)} samples; {span})")


def load_index(pattern: str | os.PathLike[str], *, labels: LabelFormat = INTEGERS, checksums: bool = False) -> Index:
    """Finds shards and loads their saved index, or builds and saves it if there is no valid one.

    Args:
        pattern: as in `find_shards`.
        labels: how they are written. A set that has names of its own is numbered like these by name.
        checksums: read all images whose checksums are unknown, and save the checksums.

    Raises:
        UserError: as `find_shards`, `build_index`, `class_names` and `Index.numbered_as`.
    """
    paths = find_shards(pattern)
    # At an address, each takes a round trip.
    with ThreadPoolExecutor(16 if is_remote(paths[0]) else 1) as threads:
        shards = list(threads.map(stat_shard, paths))
    index = _load(shards, labels)
    if index is None:
        index = build_index(shards, labels)
        _save(index, labels)
    if checksums and (index.crc32 < 0).any():
        index = add_checksums(index)
        _save(index, labels)
    own = class_names(paths)
    if own is None or labels.names is None:
        return replace(index, classes=own or labels.names)
    # The labels are numbers in the order of the set's own names.
    return replace(index, classes=own).numbered_as(labels.names, of="the file of class names")


def build_index(
    shards: Sequence[Shard], labels: LabelFormat = INTEGERS, advance: Callable[[], None] = lambda: None
) -> Index:
    """Walks all tar headers.

    Args:
        shards: in the order of the index.
        labels: how they are written.
        advance: called after each shard.

    Raises:
        UserError: a shard is not an intact tar, holds no samples, or differs from its metadata; names the first such
            shard and their number. Single samples that cannot be used are listed in the index instead.
    """
    numbers, columns, errors = [], [], []
    faults: list[Fault] = []
    for number, shard in enumerate(shards):
        with closing(open_shard(shard.path)) as file:
            scan = scan_shard(file, labels)
        metadata = read_shard_metadata(shard.path)
        if error := shard_error(shard, scan, metadata):
            errors.append(f"shard {shard.path}{error}")
        faults += scan.faults
        table = np.array([sample[1:] for sample in scan.samples], np.int64).reshape(-1, 4)
        known = metadata is not None and len(metadata.crc32) == len(table)
        crc = np.array(metadata.crc32, np.int64) if known and metadata else np.full(len(table), -1)
        columns.append(np.column_stack([table, crc]))
        numbers.append(np.full(len(table), number))
        advance()
    if errors:
        more = f" ({len(errors)} of {len(shards)} shards are damaged; `scalevit shards verify` lists all)"
        raise UserError(errors[0] + (more if len(shards) > 1 else ""))
    table = np.concatenate(columns).T
    if not table.shape[1]:
        raise UserError(f"{faults[0]}; none of {len(faults)} samples can be used")
    named = zip(_ARRAYS.items(), (np.concatenate(numbers), *table), strict=True)
    return Index(tuple(shards), **{name: column.astype(kind) for (name, kind), column in named}, faults=tuple(faults))


def shard_error(shard: Shard, scan: Scan, metadata: ShardMetadata | None) -> str:
    """Why a shard must not be used, as the end of a message that begins with its name; empty if it can be used."""
    if scan.header_errors:
        lost = ""
        if metadata is not None and metadata.samples > scan.count:
            lost = f"; {metadata.samples - len(scan.samples)} of {metadata.samples} samples are lost"
        return f", {scan.header_errors[0]}{lost}"
    if not scan.count:
        return ": holds no samples; remove it or write it again"
    if metadata is not None:
        if metadata.size != shard.size:
            return f": has {shard.size} bytes, but {metadata.size} were written; write it again"
        if metadata.samples != scan.count:
            return f": holds {scan.count} samples, but {metadata.samples} were written; write it again"
    return ""


def add_checksums(index: Index, advance: Callable[[], None] = lambda: None) -> Index:
    """The index with the checksums of all images; reads those whose checksums are unknown.

    Args:
        index: of the shards.
        advance: called after each shard.

    Raises:
        UserError: a shard cannot be read.
    """
    crc32 = index.crc32.copy()
    for number, shard in enumerate(index.shards):
        with closing(open_shard(shard.path)) as file:
            for sample in np.flatnonzero((index.shard == number) & (crc32 < 0)):
                crc32[sample] = zlib.crc32(file.read(int(index.offset[sample]), int(index.size[sample])))
        advance()
    return replace(index, crc32=crc32)


# --- the saved index --------------------------------------------------------------------------------------


def _keys(shards: Sequence[Shard], labels: LabelFormat) -> str:
    files = [(file_name(shard.path), shard.size) for shard in shards]
    return json.dumps([_FORMAT, KINDS, labels.key, *([labels.names] if labels.names else []), files])


def saved_path(shards: Sequence[Shard]) -> str:
    """Path of the saved index. It depends on the names, so a pattern for a part of a folder has its own index."""
    folder = os.path.dirname(shards[0].path)
    names = "\n".join(os.path.relpath(shard.path, folder or ".") for shard in shards)
    digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return os.path.join(folder, f".index-{digest}.npz")


def _load(shards: Sequence[Shard], labels: LabelFormat) -> Index | None:
    path = saved_path(shards)
    try:
        content = remote.read_whole(path) if is_remote(path) else Path(path).read_bytes()
        if content is None:
            return None
        with np.load(BytesIO(content), allow_pickle=False) as file:
            if file["keys"].tobytes().decode() != _keys(shards, labels):
                return None
            # Another time means that a shard was rewritten; copies at an address have other times.
            if not is_remote(path) and file["modified"].tolist() != [shard.modified for shard in shards]:
                return None
            # Stored by number, because the folder may have been moved.
            faults = [
                Fault(**{**fault, "shard": shards[fault["shard"]].path})
                for fault in json.loads(file["faults"].tobytes())
            ]
            return Index(tuple(shards), **{name: file[name] for name in _ARRAYS}, faults=tuple(faults))
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile):
        return None  # missing, incomplete or of another format: the index is built again


def _save(index: Index, labels: LabelFormat) -> None:
    """Writes the index beside local shards. All ranks may do so at the same time."""
    if is_remote(saved_path(index.shards)):
        return  # runs do not write to addresses; `scalevit shards index` on the original files does
    path = Path(saved_path(index.shards))
    numbers = {shard.path: number for number, shard in enumerate(index.shards)}
    faults = [asdict(fault) | {"shard": numbers[fault.shard]} for fault in index.faults]
    as_bytes = partial(np.frombuffer, dtype=np.uint8)
    try:
        with writing_whole(path, durable=False) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                keys=as_bytes(_keys(index.shards, labels).encode()),
                modified=np.array([shard.modified for shard in index.shards], np.int64),
                faults=as_bytes(json.dumps(faults).encode()),
                **{name: getattr(index, name) for name in _ARRAYS},
            )
    except OSError:
        pass  # a read-only or full folder: the index is built again next time
