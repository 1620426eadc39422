"""Hugging Face data sets as a source: from disk, from the hub, and Parquet files with a column of images.

The package `datasets` converts Parquet to Arrow files in its cache, because shuffled rows of Parquet are slow to read.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalevit.data import images
from scalevit.data.writing.sources.base import LeftOut, Sample, short_digest, unique_key
from scalevit.data.writing.sources.classes import ClassSettings
from scalevit.errors import SettingError, UserError, nearest_hint, require

if TYPE_CHECKING:
    import datasets

SAVED_FILES = ("state.json", "dataset_dict.json")
"""One of them is in a folder that `save_to_disk` wrote."""


class DatasetsSource:
    """A split of a Hugging Face data set, with a column of images and one of labels.

    Rows without a label are left out; data sets of the hub mark the labels of test sets by -1. Labels are integers,
    names, or `ClassLabel`s, which have both and keep their numbers unless `classes` numbers them.

    Args:
        rows: the split.
        name: of the data set, for messages.
        image: name of the column of images: bytes, or the hub's images.
        label: name of the column of labels.
        classes: how classes are numbered.
        convert: also take gif, bmp and tiff images, for the writer to convert.

    Raises:
        SettingError: `image` or `label` does not exist.
        UserError: there are no labelled images, or a name has no class.
    """

    def __init__(
        self,
        rows: "datasets.Dataset",
        name: str,
        image: str = "image",
        label: str = "label",
        classes: ClassSettings | None = None,
        *,
        convert: bool = False,
    ) -> None:
        import datasets

        for argument, column in (("image", image), ("label", label)):
            if column not in rows.column_names:
                there = f"data set {name} has the columns {', '.join(rows.column_names)}"
                raise SettingError(argument, column, there + nearest_hint(column, rows.column_names))
        self._image, self._label, self._name, self._convert = image, label, name, convert
        try:
            self._rows = rows.cast_column(image, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError):
            kind = rows.features[image]
            raise SettingError("image", image, f"data set {name} has no images there, but {kind}") from None
        values, names = self._rows[label][:], getattr(rows.features[label], "names", None)
        self._numbers = [number for number, value in enumerate(values) if value is not None and value != -1]
        self.left_out: Sequence[LeftOut] = [
            LeftOut(f"row {number} of {name}", "no label")
            for number in sorted({*range(len(values))} - {*self._numbers})
        ]
        if not self._numbers:
            raise UserError(f"data set {name}: no row has a label")
        self.classes: Sequence[str] | None
        self.classes, self._labels = _labels([values[number] for number in self._numbers], names, name, classes)

    @classmethod
    def from_disk(cls, path: str, split: str | None = None, **columns: Any) -> "DatasetsSource":
        """A data set written by `save_to_disk`; `columns` are the other arguments of this class.

        Raises:
            SettingError: `split` does not exist; as this class.
            UserError: the package is missing, or the data set cannot be read; as this class.
        """
        require("datasets", extra="datasets")
        import datasets

        with _one_line(path):
            found = datasets.load_from_disk(path)
        return cls(_split(found, split, path), path, **columns)

    @classmethod
    def from_hub(cls, name: str, split: str | None = None, **columns: Any) -> "DatasetsSource":
        """A data set of the hub ("owner/name"), or a folder with a copy of one.

        Raises:
            SettingError, UserError: as `from_disk`.
        """
        require("datasets", extra="datasets")
        import datasets

        with _one_line(name):
            found = datasets.load_dataset(name)
        return cls(_split(found, split, name), name, **columns)

    @classmethod
    def from_parquet(cls, pattern: str, **columns: Any) -> "DatasetsSource":
        """Parquet files: one, all of a folder, or those of a pattern.

        Raises:
            SettingError, UserError: as `from_disk`.
        """
        require("datasets", extra="datasets")
        import datasets

        found = glob.glob(os.path.join(pattern, "*.parquet") if os.path.isdir(pattern) else pattern)
        if not found:
            raise UserError(f"parquet {pattern}: no such files")
        with _one_line(pattern):
            rows = datasets.Dataset.from_parquet(sorted(found))
        return cls(rows, pattern, **columns)

    def __len__(self) -> int:
        return len(self._numbers)

    def load(self, number: int) -> Sample:
        content = self._rows[self._numbers[number]][self._image]
        if content is None:
            raise UserError(f"image {self.origin(number)}: is missing")
        payload, name = content.get("bytes"), content.get("path") or ""
        try:
            if payload is None:
                payload = Path(name).read_bytes()
        except OSError as error:
            raise UserError(f"image {self.origin(number)}: cannot be read ({error.strerror})") from None
        extension = images.kind_of(payload)
        if extension is None and (extension := images.convertible_kind_of(payload)) and not self._convert:
            raise UserError(f"image {self.origin(number)}: a .{extension}, which --convert writes as .png")
        if extension is None:
            raise UserError(f"image {self.origin(number)}: none of .{', .'.join(images.KINDS)}")
        stem = os.path.splitext(os.path.basename(name))[0]
        return unique_key(number, stem), extension, payload, self._labels[number]

    def origin(self, number: int) -> str:
        return f"row {self._numbers[number]} of {self._name}"

    def fingerprint(self) -> str:
        return short_digest([str(self._rows._fingerprint), self._image, self._label, str(self._labels)])


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # `datasets` limits the exceptions of neither the hub nor pyarrow.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"data set {name}: cannot be read ({reason[:300]})") from error


def _split(found: Any, split: str | None, name: str) -> "datasets.Dataset":
    if not isinstance(found, dict):
        if split is not None:
            raise SettingError("split", split, f"data set {name} has no splits")
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        raise SettingError("split", split, f"data set {name} has the splits {', '.join(found)}: give one")
    return found[split]


def _labels(
    values: Sequence[Any], names: Sequence[str] | None, name: str, classes: ClassSettings | None
) -> tuple[Sequence[str] | None, list[int]]:
    """As `ClassSettings.labelled`.

    Args:
        names: of a `ClassLabel`.
    """
    settings = classes or ClassSettings()
    for value in values:
        if not isinstance(value, int | str) or isinstance(value, bool):
            raise UserError(f"data set {name}: a label is a {type(value).__name__}, neither an integer nor a name")
    if names is None:
        return settings.labelled([str(value) for value in values])
    if settings.names is None and settings.renamed is None:
        return list(names), list(values)
    found, label_of = settings.numbered(names)
    return found, [label_of[names[value]] for value in values]
