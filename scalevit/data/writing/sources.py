"""Where the samples of new shards come from: image folders, CSV files, other shards, Hugging Face datasets, memory.

A source is a list of samples whose images are read one at a time, in any order and by any process. Knows files and
images; must not know how shards are written, nor torch.
"""

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol
from zlib import crc32

from scalevit.data import images
from scalevit.data.loading.readers import SampleReadError, open_reader
from scalevit.data.shards.index import load_index
from scalevit.data.storage.paths import file_name
from scalevit.errors import SettingError, UserError, require

Sample = tuple[str, str, bytes, int]
"""Key, extension, bytes of the image, label."""

ClassOrder = Literal["torchvision", "natural"]
"""How class names are sorted before they are numbered: torchvision's ImageFolder compares them as text ("0", "1", "10",
"2"), timm's readers compare numbers in them as numbers ("0", "1", "2", "10") and ignore case."""


class Source(Protocol):
    """Samples to be written."""

    classes: Sequence[str] | None
    """Names of the labels 0.., None if unknown."""

    def __len__(self) -> int: ...

    def load(self, number: int) -> Sample:
        """A sample with its stored image. Keys are unique and contain no dot.

        Raises:
            UserError: it cannot be read.
        """
        ...

    def origin(self, number: int) -> str:
        """Where a sample comes from, for messages."""
        ...

    def fingerprint(self) -> str:
        """16 hex digits that depend on all names and labels."""
        ...


class File(NamedTuple):
    """An image file."""

    path: str
    label: int


class FileSource:
    """Image files with labels."""

    def __init__(self, files: Sequence[File], classes: Sequence[str] | None) -> None:
        self.files, self.classes = files, classes

    def __len__(self) -> int:
        return len(self.files)

    def load(self, number: int) -> Sample:
        path, label = self.files[number]
        stem, extension = os.path.splitext(os.path.basename(path))
        try:
            with open(path, "rb") as file:
                payload = file.read()
        except OSError as error:
            raise UserError(f"image {path}: cannot be read ({error.strerror})") from None
        return unique_key(number, stem), extension[1:].lower(), payload, label

    def origin(self, number: int) -> str:
        return self.files[number].path

    def fingerprint(self) -> str:
        return short_digest(f"{path}\0{label}" for path, label in self.files)


def sorted_classes(names: Iterable[str], order: ClassOrder) -> list[str]:
    """Distinct class names in the order of their labels 0.."""
    distinct = sorted(set(names))
    return distinct if order == "torchvision" else sorted(distinct, key=_natural_key)


def _natural_key(name: str) -> list[str | int]:
    """timm's `natural_key`, without importing torch."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def image_folder(root: str | os.PathLike[str], class_order: ClassOrder = "torchvision") -> FileSource:
    """A folder with one subfolder per class, whose sorted names become the labels 0...

    Args:
        root: the folder.
        class_order: how the names are sorted.

    Raises:
        UserError: there is no class folder, a class has no images, or a file is not an image.
    """
    source = Path(root)
    if not source.is_dir():
        raise UserError(f"images at {source}: no such folder; give a folder with one subfolder of images per class")
    classes = sorted_classes((entry.name for entry in source.iterdir() if entry.is_dir()), class_order)
    if not classes:
        raise UserError(f"images at {source}: no subfolders; give a folder with one subfolder of images per class")
    found: list[File] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        before = len(found)
        for folder, subfolders, names in os.walk(source / name, followlinks=True):
            subfolders.sort()
            for file in sorted(names):
                path = os.path.join(folder, file)
                if os.path.splitext(file)[1][1:].lower() in images.KINDS:
                    found.append(File(path, label))
                else:
                    others.append(path)
        if len(found) == before:
            raise UserError(f"images at {source / name}: none of .{', .'.join(images.KINDS)}; every class needs images")
    if others:
        raise UserError(
            f"images at {source}: {len(others)} files are not .{', .'.join(images.KINDS)}, first {others[0]}; "
            "convert or remove them"
        )
    return FileSource(found, classes)


def csv_file(path: str | os.PathLike[str], class_order: ClassOrder = "torchvision") -> FileSource:
    """A CSV file with the columns `path` (relative to its folder) and `label`. If all labels are integers they are used
    as they are; otherwise they are class names, whose sorted order gives the labels 0...

    Args:
        path: of the CSV file.
        class_order: how class names are sorted.

    Raises:
        UserError: it cannot be read, lacks a column or a field, or names no image.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lacking = {"path", "label"} - set(reader.fieldnames or ())
            if lacking:
                raise UserError(f"{path}: the first line must name the columns path and label (no {min(lacking)})")
            rows = [(row["path"], row["label"], reader.line_num) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not rows:
        raise UserError(f"{path}: names no images")
    for name, label, line in rows:
        if not name or not label:
            raise UserError(f"{path}, line {line}: no {'label' if name else 'path'}")
        if os.path.splitext(name)[1][1:].lower() not in images.KINDS:
            raise UserError(f"{path}, line {line}: {name} is none of .{', .'.join(images.KINDS)}")
    folder = os.path.dirname(os.fspath(path))
    if all(re.fullmatch(r"-?\d{1,18}", label) for _, label, _ in rows):
        return FileSource([File(os.path.join(folder, name), int(label)) for name, label, _ in rows], None)
    classes = sorted_classes((label for _, label, _ in rows), class_order)
    numbers = {name: number for number, name in enumerate(classes)}
    return FileSource([File(os.path.join(folder, name), numbers[label]) for name, label, _ in rows], classes)


class ShardSource:
    """Existing shards, whatever tool wrote them.

    Args:
        pattern: as in `discovery.find_shards`.
        label_key: key of the label in `.json` members.

    Raises:
        UserError: the shards are missing or damaged, or contain samples that cannot be used.
    """

    classes: Sequence[str] | None = None

    def __init__(self, pattern: str, label_key: str) -> None:
        self._index = load_index(pattern, label_key=label_key)
        if self._index.faults:
            raise UserError(f"{self._index.faults[0]} ({len(self._index.faults)} such samples): fix or remove them")
        self._reader = open_reader(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def load(self, number: int) -> Sample:
        index = self._index
        try:
            payload = self._reader.read(number)
        except SampleReadError as error:
            raise UserError(str(index.fault(number, str(error)))) from None
        if index.crc32[number] >= 0 and crc32(payload) != index.crc32[number]:
            raise UserError(str(index.fault(number, "the image's bytes have changed (wrong checksum)")))
        key = file_name(index.key(number))
        return unique_key(number, key), images.KINDS[index.kind[number]], payload, int(index.label[number])

    def origin(self, number: int) -> str:
        return f"{self._index.key(number)} of {self._index.shards[self._index.shard[number]].path}"

    def fingerprint(self) -> str:
        return self._index.fingerprint


class DatasetsSource:
    """A Hugging Face data set written by `save_to_disk`, with a column of images and one of labels.

    Args:
        path: its folder.
        split: one of its splits; None for a data set without splits.
        image: name of the column of images.
        label: name of the column of labels.

    Raises:
        SettingError: `split`, `image` or `label` does not exist.
        UserError: the package `datasets` is missing, or the data set cannot be read.
    """

    def __init__(self, path: str, split: str | None = None, image: str = "image", label: str = "label") -> None:
        require("datasets", extra="datasets")
        import datasets

        try:
            found: Any = datasets.load_from_disk(path)
        except (OSError, ValueError) as error:
            raise UserError(f"data set {path}: cannot be read ({' '.join(str(error).split())})") from None
        if isinstance(found, dict):
            if split not in found:
                raise SettingError("split", split, f"data set {path} has the splits {', '.join(found)}")
            found = found[split]
        elif split is not None:
            raise SettingError("split", split, f"data set {path} has no splits")
        for argument, name in (("image", image), ("label", label)):
            if name not in found.column_names:
                raise SettingError(argument, name, f"data set {path} has the columns {', '.join(found.column_names)}")
        names = getattr(found.features[label], "names", None)
        self.classes: Sequence[str] | None = list(names) if names else None
        self._image, self._label, self._path = image, label, path
        self._set = found.cast_column(image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._set)

    def load(self, number: int) -> Sample:
        row = self._set[number]
        content, label = row[self._image], row[self._label]
        payload, name = content.get("bytes"), content.get("path") or ""
        try:
            if payload is None:
                payload = Path(name).read_bytes()
        except OSError as error:
            raise UserError(f"data set {self._path}, row {number}: cannot be read ({error.strerror})") from None
        if not isinstance(label, int):
            raise UserError(f"data set {self._path}, row {number}: the label {label!r} is not an integer")
        extension = images.kind_of(payload)
        if extension is None:
            raise UserError(f"data set {self._path}, row {number}: none of .{', .'.join(images.KINDS)}")
        return unique_key(number, os.path.splitext(os.path.basename(name))[0]), extension, payload, label

    def origin(self, number: int) -> str:
        return f"{self._path}, row {number}"

    def fingerprint(self) -> str:
        return short_digest([str(self._set._fingerprint), self._image, self._label])


class MemorySource:
    """Samples in memory, with their own keys."""

    def __init__(self, samples: Sequence[Sample], classes: Sequence[str] | None = None) -> None:
        keys = {key for key, _, _, _ in samples}
        bad = [sample for sample in samples if "." in sample[0] or sample[1] not in images.KINDS]
        if len(keys) != len(samples) or bad:
            raise ValueError(f"keys must be unique and contain no dot, extensions must be one of {images.KINDS}")
        self.samples, self.classes = samples, classes

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, number: int) -> Sample:
        return self.samples[number]

    def origin(self, number: int) -> str:
        return self.samples[number][0]

    def fingerprint(self) -> str:
        return short_digest(
            f"{key}.{kind}\0{label}\0{hashlib.sha256(payload).hexdigest()}"
            for key, kind, payload, label in self.samples
        )


def unique_key(number: int, name: str) -> str:
    """A key from the sample's number, which makes it unique, and its name, which helps to find the file."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", re.sub(r"^\d{9}-", "", name))[:80]
    return f"{number:09d}-{stem}" if stem else f"{number:09d}"


def short_digest(lines: Iterable[str]) -> str:
    """16 hex digits of the SHA-256 of lines."""
    hashed = hashlib.sha256()
    for line in lines:
        hashed.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return hashed.hexdigest()[:16]
