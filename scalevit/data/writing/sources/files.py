"""Image files as sources: class folders, and tables of paths and labels."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scalevit.data import images
from scalevit.data.writing.sources.base import LeftOut, Sample, short_digest, unique_key
from scalevit.data.writing.sources.classes import ClassSettings
from scalevit.errors import SettingError, UserError, nearest_hint


class File(NamedTuple):
    """An image file."""

    path: str
    label: int


class FileSource:
    """Image files with labels."""

    def __init__(self, files: Sequence[File], classes: Sequence[str] | None, left_out: Sequence[LeftOut] = ()) -> None:
        self.files, self.classes, self.left_out = files, classes, left_out

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


def why_no_image(name: str, *, convert: bool) -> str | None:
    """Why a file is not written, by its name; None if it is.

    Args:
        convert: whether kinds that shards cannot hold are written as PNG.
    """
    kind = os.path.splitext(name)[1][1:].lower()
    if name.startswith(".") or kind not in (*images.KINDS, *images.CONVERTIBLE):
        return "no image, by its name"
    if kind in images.CONVERTIBLE and not convert:
        return f"a .{kind}, which --convert writes as .png"
    return None


def image_folder(
    root: str | os.PathLike[str], classes: ClassSettings | None = None, *, convert: bool = False
) -> FileSource:
    """A folder with one subfolder per class. Files that are no images and folders without images are left out.

    Args:
        root: the folder.
        classes: how the names of the subfolders are numbered; by default sorted as torchvision does.
        convert: also take gif, bmp and tiff files, for the writer to convert.

    Raises:
        UserError: there are no images in subfolders, or a name has no class.
    """
    source = Path(root)
    if not source.is_dir():
        raise UserError(f"images at {source}: no such folder; give a folder with one subfolder of images per class")
    left_out = [
        LeftOut(str(entry), "beside the class folders") for entry in sorted(source.iterdir()) if not entry.is_dir()
    ]
    found: dict[str, list[str]] = {}
    for entry in sorted(source.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            paths = _images_below(entry, left_out, convert=convert)
            if paths:
                found[entry.name] = paths
            else:
                left_out.append(LeftOut(str(entry), "a class folder without images"))
    if not found:
        raise UserError(
            f"images at {source}: no images in subfolders; give a folder with one subfolder of images per class"
        )
    names, labels = (classes or ClassSettings()).numbered(found)
    in_order = sorted(found, key=lambda name: (labels[name], name))
    return FileSource([File(path, labels[name]) for name in in_order for path in found[name]], names, left_out)


def _images_below(root: Path, left_out: list[LeftOut], *, convert: bool) -> list[str]:
    found = []
    for path in files_below(root):
        if reason := why_no_image(os.path.basename(path), convert=convert):
            left_out.append(LeftOut(path, reason))
        else:
            found.append(path)
    return found


def files_below(root: str | os.PathLike[str]) -> Iterator[str]:
    """The files of a folder and its subfolders, by name. Follows links, but visits no folder twice."""
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders.sort()
        yield from (os.path.join(folder, name) for name in sorted(names))


def table_file(
    path: str | os.PathLike[str],
    classes: ClassSettings | None = None,
    *,
    path_column: str = "path",
    label_column: str = "label",
    convert: bool = False,
) -> FileSource:
    """A CSV or TSV file with a column of paths (relative to its folder) and one of labels.

    Labels are integers or class names: see `ClassSettings.labelled`.

    Args:
        path: of the file; the columns of a .tsv are separated by tabs.
        classes: how class names are numbered; by default sorted as torchvision does.
        path_column: name of the column of paths.
        label_column: name of the column of labels.
        convert: also take gif, bmp and tiff files, for the writer to convert.

    Raises:
        SettingError: `path_column` or `label_column` does not exist.
        UserError: it cannot be read, lacks a field, or names no image.
    """
    rows = _read_table(path, {"path_column": path_column, "label_column": label_column})
    left_out, kept = [], []
    for name, label, line in rows:
        if not name or not label:
            raise UserError(f"{path}, line {line}: no {'label' if name else 'path'}")
        if reason := why_no_image(os.path.basename(name), convert=convert):
            left_out.append(LeftOut(name, reason))
        else:
            kept.append((os.path.join(os.path.dirname(os.fspath(path)), name), label))
    if not kept:
        raise UserError(f"{path}: names no images")
    names, labels = (classes or ClassSettings()).labelled([label for _, label in kept])
    return FileSource([File(name, label) for (name, _), label in zip(kept, labels, strict=True)], names, left_out)


def _read_table(path: str | os.PathLike[str], columns: Mapping[str, str]) -> list[tuple[str, str, int]]:
    """The values of two columns, and the line, of each row.

    Args:
        columns: name of each column by the argument that gives it.
    """
    delimiter = "\t" if Path(path).suffix.lower() == ".tsv" else ","
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            known = reader.fieldnames or ()
            for argument, name in columns.items():
                if name not in known:
                    there = f"{path} has the columns {', '.join(known)}{nearest_hint(name, known)}"
                    raise SettingError(argument, name, there)
            first, second = columns.values()
            return [(row[first], row[second], reader.line_num) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
