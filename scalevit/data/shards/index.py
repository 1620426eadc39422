"""The index of the samples in a set of shards.

It says for every sample in which shard its image starts, how long it is, and its label, so that any sample is one read
away. It is built by a walk over the tar headers, saved beside the shards, and used again while their names, sizes and
times stay the same. The format is described in docs/data.md. Knows files and numpy; must not know ranks or torch.
"""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path

import numpy as np

from scalevit.data.faults import Fault
from scalevit.data.images import KINDS
from scalevit.data.shards import tar
from scalevit.data.shards.discovery import Shard, find_shards, stat_shard
from scalevit.data.shards.labels import DEFAULT_KEY
from scalevit.data.shards.samples import Description, Scan, describe_shard, scan_shard
from scalevit.data.storage.files import is_remote, open_shard
from scalevit.errors import UserError

_FORMAT = 2
# What decides which sample a position shows.
_PLACES = {"shard": np.int32, "offset": np.int64, "size": np.int64, "kind": np.uint8, "label": np.int64}
_ARRAYS = {**_PLACES, "crc32": np.int64}


@dataclass(frozen=True)
class Index:
    """Where each usable sample is; all arrays are (N,), in the order of the shards and of the samples in them."""

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
    """int64, checksum of the image's bytes, -1 where it is not known."""
    faults: tuple[Fault, ...] = ()
    """Samples of the shards that are not in the index, because they cannot be used."""

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that differ whenever a sample's place, size or label does; names and times do not count."""
        digest = hashlib.sha256(b"index 1")
        for name, kind in _PLACES.items():
            digest.update(getattr(self, name).astype(np.dtype(kind).newbyteorder("<")).tobytes())
        return digest.hexdigest()[:16]

    def key(self, sample: int) -> str:
        """The key of a sample, read from its shard."""
        with closing(open_shard(self.shards[self.shard[sample]].path)) as file:
            return tar.key_before(file, int(self.offset[sample]))

    def fault(self, sample: int, reason: str) -> Fault:
        """A fault of a sample, with the names that a person needs to find it."""
        try:
            key = self.key(sample)
        except UserError:
            key = "?"
        return Fault(self.shards[self.shard[sample]].path, key, int(self.offset[sample]), reason)

    def check_labels(self, num_classes: int) -> None:
        """Raises UserError, with the first wrong sample, unless all labels are in 0..num_classes-1."""
        wrong = np.flatnonzero((self.label < 0) | (self.label >= num_classes))
        if len(wrong):
            label = self.label[wrong[0]]
            raise UserError(
                f"{self.fault(wrong[0], f'label {label} is not in 0..{num_classes - 1}')} "
                f"({len(wrong)} of {len(self)} samples); set model.num_classes or mend the shards"
            )


def load_index(pattern: str | os.PathLike[str], *, label_key: str = DEFAULT_KEY, checksums: bool = False) -> Index:
    """Finds shards and indexes them, from the saved index where it is still right.

    Args:
        pattern: as in `find_shards`.
        label_key: of labels in `.json` members.
        checksums: read all images once and keep their checksums, where the shards come without.

    Raises:
        UserError: as `find_shards` and `build_index`.
    """
    paths = find_shards(pattern)
    # Each costs a round trip where the shards are elsewhere.
    with ThreadPoolExecutor(16 if is_remote(paths[0]) else 1) as threads:
        shards = list(threads.map(stat_shard, paths))
    index = _load(shards, label_key)
    if index is None:
        index = build_index(shards, label_key)
        _save(index, label_key)
    if checksums and (index.crc32 < 0).any():
        index = add_checksums(index)
        _save(index, label_key)
    return index


def build_index(
    shards: Sequence[Shard], label_key: str = DEFAULT_KEY, advance: Callable[[], None] = lambda: None
) -> Index:
    """Walks all tar headers.

    Args:
        shards: in their order.
        label_key: of labels in `.json` members.
        advance: called after each shard.

    Raises:
        UserError: a shard is not a whole tar, holds no samples, or differs from its description; names the first, and
            how many there are. Single samples that cannot be used are listed in the index instead.
    """
    numbers, columns, problems = [], [], []
    faults: list[Fault] = []
    for number, shard in enumerate(shards):
        with closing(open_shard(shard.path)) as file:
            scan = scan_shard(file, label_key)
        description = describe_shard(shard.path)
        problem = shard_problem(shard, scan, description)
        if problem:
            problems.append(f"shard {shard.path}{problem}")
        faults += scan.faults
        table = np.array([row[1:] for row in scan.rows], np.int64).reshape(-1, 4)
        known = description is not None and len(description.crc32) == len(table)
        crc = np.array(description.crc32, np.int64) if known and description else np.full(len(table), -1)
        columns.append(np.column_stack([table, crc]))
        numbers.append(np.full(len(table), number))
        advance()
    if problems:
        more = f" ({len(problems)} of {len(shards)} shards are damaged; `scalevit shards verify` lists all)"
        raise UserError(problems[0] + (more if len(shards) > 1 else ""))
    table = np.concatenate(columns).T
    if not table.shape[1]:
        raise UserError(f"{faults[0]}; no sample of {len(faults)} can be used")
    named = zip(_ARRAYS.items(), (np.concatenate(numbers), *table), strict=True)
    return Index(tuple(shards), **{name: column.astype(kind) for (name, kind), column in named}, faults=tuple(faults))


def shard_problem(shard: Shard, scan: Scan, description: Description | None) -> str:
    """Why a whole shard must not be used, to follow its name in a message; empty if it may."""
    if scan.breaks:
        lost = ""
        if description is not None and description.samples > len(scan.rows) + len(scan.faults):
            lost = f"; {description.samples - len(scan.rows)} of {description.samples} samples are lost"
        return f", {scan.breaks[0]}{lost}"
    if not scan.rows and not scan.faults:
        return ": holds no samples; remove it or write it again"
    if description is not None:
        found = len(scan.rows) + len(scan.faults)
        if description.size != shard.size:
            return f": has {shard.size} bytes, and {description.size} when it was written; write it again"
        if description.samples != found:
            return f": holds {found} samples, and {description.samples} when it was written; write it again"
    return ""


def add_checksums(index: Index, advance: Callable[[], None] = lambda: None) -> Index:
    """The index with checksums of all images, which it reads (but for those that it knows).

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


# --- saving -----------------------------------------------------------------------------------------------


def _keys(shards: Sequence[Shard], label_key: str) -> str:
    files = [(shard.path.rpartition("/")[2], shard.size) for shard in shards]
    return json.dumps([_FORMAT, KINDS, label_key, files])


def saved_path(shards: Sequence[Shard]) -> str:
    """One file for each set of names, so that a pattern over a part of a folder keeps an index of its own."""
    folder = os.path.dirname(shards[0].path)
    names = "\n".join(os.path.relpath(shard.path, folder or ".") for shard in shards)
    digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return os.path.join(folder, f".index-{digest}.npz")


def _load(shards: Sequence[Shard], label_key: str) -> Index | None:
    path = saved_path(shards)
    try:
        if is_remote(path):
            from scalevit.data.storage.remote import read_whole

            content = read_whole(path)
            if content is None:
                return None
        else:
            content = Path(path).read_bytes()
        with np.load(BytesIO(content), allow_pickle=False) as file:
            if file["keys"].tobytes().decode() != _keys(shards, label_key):
                return None
            # A copy elsewhere has other times; here they tell that a shard was written anew.
            if not is_remote(path) and file["modified"].tolist() != [shard.modified for shard in shards]:
                return None
            # By number: the folder may have been moved since.
            faults = [
                Fault(**{**fault, "shard": shards[fault["shard"]].path})
                for fault in json.loads(file["faults"].tobytes())
            ]
            return Index(tuple(shards), **{name: file[name] for name in _ARRAYS}, faults=tuple(faults))
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile):
        return None  # missing, torn or foreign: it is only a shortcut and is made again


def _save(index: Index, label_key: str) -> None:
    """Every rank may do this at once: each writes a file of its own and renames it."""
    if is_remote(saved_path(index.shards)):
        return  # a training run writes nothing where its data is; `scalevit shards index` beside the originals does
    path = Path(saved_path(index.shards))
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    numbers = {shard.path: number for number, shard in enumerate(index.shards)}
    faults = [asdict(fault) | {"shard": numbers[fault.shard]} for fault in index.faults]
    as_bytes = partial(np.frombuffer, dtype=np.uint8)
    try:
        with open(temporary, "wb") as file:
            np.savez(
                file,
                keys=as_bytes(_keys(index.shards, label_key).encode()),
                modified=np.array([shard.modified for shard in index.shards], np.int64),
                faults=as_bytes(json.dumps(faults).encode()),
                **{name: getattr(index, name) for name in _ARRAYS},
            )
        os.rename(temporary, path)
    except OSError:
        # A read-only or full folder: the index is built again next time.
        with suppress(OSError):
            temporary.unlink()
