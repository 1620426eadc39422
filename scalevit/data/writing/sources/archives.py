"""ImageNet's official archives as sources, read in place: one tar per class, and a flat set with a list of labels.

ILSVRC2012_img_train.tar holds a tar per class, ILSVRC2012_img_val.tar 50,000 images whose classes are in the
development kit; ImageNet-21k is a folder with a tar per class.
"""

import csv
import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scalevit.data.writing.sources.base import LeftOut, Sample, short_digest, unique_key
from scalevit.data.writing.sources.classes import ClassSettings
from scalevit.data.writing.sources.files import why_no_image
from scalevit.errors import UserError

_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
# A class and its boxes, as in Kaggle's LOC_val_solution.csv: "n01751748 111 108 230 366".
_BOXES = re.compile(r"n\d{8}(\s+\d+)+")


class Member(NamedTuple):
    """An image in a file: a member of a tar, or a whole file (offset 0)."""

    path: str
    offset: int
    size: int
    name: str
    """With its extension."""
    label: int


class ArchiveSource:
    """Images inside tars, which are not unpacked."""

    def __init__(self, members: Sequence[Member], classes: Sequence[str] | None, left_out: Sequence[LeftOut]) -> None:
        self.members, self.left_out, self.classes = members, left_out, classes

    def __len__(self) -> int:
        return len(self.members)

    def load(self, number: int) -> Sample:
        path, offset, size, name, label = self.members[number]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                payload = file.read(size)
        except OSError as error:
            raise UserError(f"image {self.origin(number)}: cannot be read ({error.strerror})") from None
        if len(payload) < size:
            raise UserError(f"image {self.origin(number)}: the archive ends before it; copy it again")
        stem, extension = os.path.splitext(os.path.basename(name))
        return unique_key(number, stem), extension[1:].lower(), payload, label

    def origin(self, number: int) -> str:
        member = self.members[number]
        return member.path if member.offset == 0 else f"{member.name} in {member.path}"

    def fingerprint(self) -> str:
        return short_digest(f"{m.path}\0{m.offset}\0{m.size}\0{m.label}" for m in self.members)


def class_archives(
    path: str | os.PathLike[str], classes: ClassSettings | None = None, *, convert: bool = False
) -> ArchiveSource:
    """A tar per class, whose name is that of the class: in a folder, or in a tar (ILSVRC2012_img_train.tar).

    Args:
        path: of the folder or the tar.
        classes: how classes are numbered; by default their names are sorted, as everybody numbers ImageNet's.
        convert: as for `files.image_folder`.

    Raises:
        UserError: it is missing or damaged, or holds no tars of images.
    """
    found: dict[str, list[tuple[str, int, int, str]]] = {}
    left_out: list[LeftOut] = []
    for archive, offset, name in _inner_tars(Path(path), left_out):
        class_name = Path(name).stem
        for member, start, size in _images_in(archive, offset, name, left_out, convert=convert):
            found.setdefault(class_name, []).append((archive, start, size, member))
        if class_name not in found:
            left_out.append(LeftOut(name, "a tar without images"))
    if not found:
        raise UserError(f"archives at {path}: no tars with images in them")
    names, labels = (classes or ClassSettings()).numbered(found)
    in_order = sorted(found, key=lambda name: (labels[name], name))
    members = [Member(*member, labels[name]) for name in in_order for member in found[name]]
    return ArchiveSource(members, names, left_out)


def flat_images(
    path: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    classes: ClassSettings | None = None,
    *,
    convert: bool = False,
) -> ArchiveSource:
    """Images without class folders, in a folder or a tar (ILSVRC2012_img_val.tar), and the classes of their names.

    Args:
        path: of the folder or the tar.
        labels: ImageNet's development kit (ILSVRC2012_devkit_t12.tar.gz or its folder), or a text file with a name and
            its class in each line (as Kaggle's LOC_val_solution.csv, or two columns). Lines of other names, such as a
            heading, are not used.
        classes: how classes are numbered: see `ClassSettings.labelled`.
        convert: as for `files.image_folder`.

    Raises:
        UserError: something is missing or damaged, or an image has no class.
    """
    left_out: list[LeftOut] = []
    source = Path(path)
    if source.is_dir():
        kept = []
        for entry in sorted(source.iterdir()):
            if reason := why_no_image(entry.name, convert=convert):
                left_out.append(LeftOut(str(entry), reason))
            elif entry.is_file():
                kept.append((str(entry), 0, entry.stat().st_size, entry.name))
    else:
        inside = _images_in(str(source), 0, str(source), left_out, convert=convert)
        kept = sorted(((str(source), start, size, name) for name, start, size in inside), key=lambda each: each[3])
    if not kept:
        raise UserError(f"images at {path}: there are none")
    stems = [Path(name).stem for _, _, _, name in kept]
    class_of = _classes_of(Path(labels), stems)
    for stem in stems:
        if stem not in class_of:
            raise UserError(f"labels {labels}: have none for image {stem}")
    names, numbers = (classes or ClassSettings()).labelled([class_of[stem] for stem in stems])
    return ArchiveSource([Member(*each, number) for each, number in zip(kept, numbers, strict=True)], names, left_out)


def _inner_tars(path: Path, left_out: list[LeftOut]) -> Iterator[tuple[str, int, str]]:
    """The file, the offset in it and the name of each tar in a folder or a tar."""
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if entry.suffix == ".tar" and not entry.name.startswith("."):
                yield str(entry), 0, entry.name
            else:
                left_out.append(LeftOut(str(entry), "no .tar, by its name"))
        return
    with _open_tar(path, 0, str(path)) as outer:
        for member in _members(outer, str(path)):
            if member.name.endswith(".tar") and not os.path.basename(member.name).startswith("."):
                yield str(path), member.offset_data, member.name
            else:
                left_out.append(LeftOut(f"{member.name} in {path}", "no .tar, by its name"))


def _images_in(
    path: str, offset: int, name: str, left_out: list[LeftOut], *, convert: bool
) -> Iterator[tuple[str, int, int]]:
    """The name, offset in the file and size of each image in a tar that begins at an offset of a file."""
    with _open_tar(Path(path), offset, name) as tar:
        for member in _members(tar, name):
            if reason := why_no_image(os.path.basename(member.name), convert=convert):
                left_out.append(LeftOut(f"{member.name} in {name}", reason))
            else:
                yield member.name, offset + member.offset_data, member.size


def _members(tar: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    try:
        for member in tar:
            if member.isfile():
                yield member
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"archive {name}: is damaged ({error}); copy it again") from None


class _Rest(io.BufferedReader):
    """A file from an offset on: a tar inside another one begins there."""

    def __init__(self, path: Path, offset: int):
        super().__init__(io.FileIO(path))
        self._offset = offset
        super().seek(offset)

    def seek(self, position: int, whence: int = 0) -> int:
        return super().seek(position + (self._offset if whence == 0 else 0), whence) - self._offset

    def tell(self) -> int:
        return super().tell() - self._offset


def _open_tar(path: Path, offset: int, name: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=_Rest(path, offset), mode="r:")
    except (tarfile.TarError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"archive {name}: cannot be read ({reason}); give an uncompressed tar") from None


# --- labels of flat images --------------------------------------------------------------------------------


def _classes_of(labels: Path, stems: Sequence[str]) -> dict[str, str]:
    """Class by the name of an image without its extension."""
    if labels.is_dir() or labels.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _of_development_kit(labels, stems)
    try:
        lines = labels.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"labels {labels}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    wanted, found = set(stems), dict[str, str]()
    for number, line in enumerate(lines, 1):
        columns = next((row for row in _columns(line) if Path(row[0].strip()).stem in wanted), None)
        if columns is None:
            continue
        stem, value = Path(columns[0].strip()).stem, columns[1].strip() if len(columns) > 1 else ""
        value = value.split()[0] if _BOXES.fullmatch(value) else value
        if not value or found.setdefault(stem, value) != value:
            reason = "has no class" if not value else f"is {value!r} here and {found[stem]!r} before"
            raise UserError(f"labels {labels}, line {number}: image {stem} {reason}")
    return found


def _columns(line: str) -> Iterator[list[str]]:
    """The readings of a line as columns that are separated by tabs, commas or spaces."""
    if "\t" in line:
        yield line.split("\t")
    if "," in line:
        yield next(csv.reader([line]))
    if line.strip():
        yield line.split(maxsplit=1)


def _of_development_kit(kit: Path, stems: Sequence[str]) -> dict[str, str]:
    """The n-th image by name has the n-th number in the ground truth, which the kit's meta.mat names."""
    files = _kit_files(kit)
    wordnet = _wordnet_names(kit, files[_META])
    numbers = files[_GROUND_TRUTH].decode("ascii", "replace").split()
    unknown = next((number for number in numbers if number not in wordnet), None)
    if unknown is not None:
        raise UserError(f"labels {kit}: {_META} has no class of the number {unknown}")
    in_order = sorted(stems)
    if len(numbers) != len(in_order):
        raise UserError(f"labels {kit}: name {len(numbers)} images, but there are {len(in_order)}")
    if not all(re.search(r"\d+$", stem) for stem in in_order):
        raise UserError(f"labels {kit}: number images, but the names of some do not end with a number")
    return {stem: wordnet[number] for stem, number in zip(in_order, numbers, strict=True)}


def _wordnet_names(kit: Path, meta: bytes) -> dict[str, str]:
    """WordNet's name of a class by its number, in digits."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in synsets}
    except Exception as error:  # scipy does not limit what a damaged file raises
        raise UserError(f"labels {kit}: {_META} cannot be read ({type(error).__name__}: {error})") from error


def _kit_files(kit: Path) -> dict[str, bytes]:
    wanted = (_GROUND_TRUTH, _META)
    found: dict[str, bytes] = {}
    try:
        if kit.is_dir():
            found = {path.name: path.read_bytes() for path in sorted(kit.rglob("*")) if path.name in wanted}
        else:
            with tarfile.open(kit) as tar:
                for member in tar:
                    file = tar.extractfile(member) if os.path.basename(member.name) in wanted else None
                    if file is not None:
                        found[os.path.basename(member.name)] = file.read()
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"labels {kit}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    for name in wanted:
        if name not in found:
            raise UserError(f"labels {kit}: have no {name}; is this ILSVRC2012_devkit_t12?")
    return found
