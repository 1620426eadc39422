"""Finding shards, and the index of the samples in them.

The index says for every sample in which shard its image starts, how long it is, and its label, so that any sample is
one `pread` away. It is built by a walk over the tar headers, saved beside the shards, and used again while their
names, sizes and times stay the same. Knows files and numpy; must not know images, ranks or torch.
"""

import glob
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from scalevit.data import tar
from scalevit.data.images import KINDS
from scalevit.errors import UserError

_FORMAT = 1
_ARRAYS = {"shard": np.int32, "offset": np.int64, "size": np.int64, "kind": np.uint8, "label": np.int64}


@dataclass(frozen=True)
class Shard:
    """A tar file as it was when it was indexed."""

    path: str
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""


@dataclass(frozen=True)
class Index:
    """Where each sample is; all arrays are (N,), in the order of the shards and of the samples in them."""

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

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that differ whenever a sample's place, size or label does; names and times do not count."""
        digest = hashlib.sha256(f"index {_FORMAT}".encode())
        for name, kind in _ARRAYS.items():
            digest.update(getattr(self, name).astype(np.dtype(kind).newbyteorder("<")).tobytes())
        return digest.hexdigest()[:16]

    def describe(self, sample: int) -> str:
        """Shard, key and offset of a sample, for messages."""
        path, offset = self.shards[self.shard[sample]].path, int(self.offset[sample])
        return f"shard {path}, key {tar.key_before(path, offset)!r}, offset {offset}"

    def check_labels(self, num_classes: int) -> None:
        """Raises UserError, with the first wrong sample, unless all labels are in 0..num_classes-1."""
        wrong = np.flatnonzero((self.label < 0) | (self.label >= num_classes))
        if len(wrong):
            raise UserError(
                f"{self.describe(wrong[0])}: label {self.label[wrong[0]]} is not in 0..{num_classes - 1} "
                f"({len(wrong)} of {len(self)} samples); set model.num_classes or mend the shards"
            )


def load_index(pattern: str | os.PathLike[str]) -> Index:
    """Finds shards and indexes them, from the saved index where it is still right.

    Args:
        pattern: as in `find_shards`.

    Raises:
        UserError: as `find_shards` and `build_index`.
    """
    shards = [_stat(path) for path in find_shards(pattern)]
    saved = _saved_path(shards)
    index = _load(saved, shards)
    if index is None:
        index = build_index(shards)
        _save(saved, index)
    return index


def find_shards(pattern: str | os.PathLike[str]) -> list[str]:
    """The tar files of a folder, of a glob, or of `{000..146}` braces, each of which must exist.

    Raises:
        UserError: none there, or one of the braces' missing.
    """
    text = os.fspath(pattern)
    if "://" in text or text.startswith("pipe:"):
        raise UserError(f"shards at {text}: only local files can be read")
    if os.path.isdir(text):
        found = sorted(filter(os.path.isfile, glob.glob(os.path.join(glob.escape(text), "*.tar"))))
        folder = text.rstrip("/")
    else:
        try:
            names = list(braceexpand(text))
        except ValueError:
            raise UserError(f"shards at {text}: the braces do not match") from None
        found = [path for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
        missing = [path for path in found if not os.path.isfile(path)]
        if len(names) > 1 and missing and len(missing) < len(found):
            raise UserError(f"shards at {text}: {len(missing)} of {len(found)} are missing, first {missing[0]}")
        found = [] if missing else found
        folder = os.path.dirname(text) if text.endswith(".tar") or glob.has_magic(text) else text
    if not found:
        raise UserError(
            f"no shards at {text}: make them with `scalevit shards write --source IMAGES --destination {folder}`"
        )
    return found


def build_index(shards: Sequence[Shard]) -> Index:
    """Walks all tar headers.

    Raises:
        UserError: a shard that is not a whole tar, a sample without image or label, or two with one key; names the
            shard and the offset.
    """
    tables = [np.array(list(_samples(shard.path)), np.int64) for shard in shards]
    columns = np.concatenate(tables).T
    numbers = np.repeat(np.arange(len(shards)), [len(table) for table in tables])
    named = zip(_ARRAYS.items(), (numbers, *columns), strict=True)
    return Index(tuple(shards), **{name: column.astype(kind) for (name, kind), column in named})


def _samples(path: str) -> Iterator[tuple[int, int, int, int]]:
    """Offset, size, kind and label of each sample of a shard.

    As for webdataset, a sample is a run of neighbouring members with the same name up to the first dot of the last
    part. Members with other extensions are further fields of the sample and not ours.
    """
    current: str | None = None
    image: tuple[int, int, int] | None = None
    label: int | None = None
    seen: set[str] = set()

    def complete() -> tuple[int, int, int, int]:
        if image is None or label is None:
            lacking = f"no .{', .'.join(KINDS)}" if image is None else "no .cls"
            raise UserError(f"shard {path}: key {current!r} has {lacking} member")
        return (*image, label)

    for member in tar.members(path):
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem or not dot or (stem.startswith("__") and stem.endswith("__")):
            continue  # webdataset's own rule: not part of any sample
        key, extension = folder + slash + stem, extension.lower()
        if key != current:
            if current is not None:
                yield complete()
            if key in seen:
                raise UserError(f"shard {path}, offset {member.offset}: the key {key!r} comes a second time")
            seen.add(key)
            current, image, label = key, None, None
        if extension in KINDS or extension == "cls":
            if (label if extension == "cls" else image) is not None:
                raise UserError(f"shard {path}, offset {member.offset}: the key {key!r} has two of .{extension}")
            if extension == "cls":
                label = _label(path, key, member)
            else:
                image = (member.offset, member.size, KINDS.index(extension))
    if current is None:
        raise UserError(f"shard {path}: holds no samples; remove it or write it again")
    yield complete()


def _label(path: str, key: str, member: tar.Member) -> int:
    text = member.start[: member.size].strip()
    digits = text.removeprefix(b"-")
    if member.size > len(member.start) or not digits.isdigit() or len(digits) > 18:
        shown = text[:20].decode("ascii", "replace")
        raise UserError(f"shard {path}, key {key!r}, offset {member.offset}: the label {shown!r} is not an integer")
    return int(text)


# --- saving -----------------------------------------------------------------------------------------------


def _stat(path: str) -> Shard:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"shard {path}: cannot be read ({error.strerror})") from None
    return Shard(path, status.st_size, status.st_mtime_ns)


def _keys(shards: Sequence[Shard]) -> str:
    files = [(os.path.basename(shard.path), shard.size, shard.modified) for shard in shards]
    return json.dumps([_FORMAT, KINDS, files])


def _saved_path(shards: Sequence[Shard]) -> Path:
    """One file for each set of names, so that a pattern over a part of a folder keeps an index of its own."""
    folder = os.path.dirname(shards[0].path)
    names = "\n".join(os.path.relpath(shard.path, folder or ".") for shard in shards)
    digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return Path(shards[0].path).with_name(f".index-{digest}.npz")


def _load(path: Path, shards: Sequence[Shard]) -> Index | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            if file["keys"].tobytes().decode() != _keys(shards):
                return None
            return Index(tuple(shards), **{name: file[name] for name in _ARRAYS})
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # missing, torn or foreign: it is only a shortcut and is made again


def _save(path: Path, index: Index) -> None:
    """Every rank may do this at once: each writes a file of its own and renames it."""
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            keys = np.frombuffer(_keys(index.shards).encode(), np.uint8)
            np.savez(file, keys=keys, **{name: getattr(index, name) for name in _ARRAYS})
        os.rename(temporary, path)
    except OSError:
        # A read-only or full folder: the index is built again next time.
        with suppress(OSError):
            temporary.unlink()
