"""A Hugging Face data set as a source."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalevit.data import images
from scalevit.data.writing.sources.base import LeftOut, Sample, short_digest, unique_key
from scalevit.errors import SettingError, UserError, require


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

    left_out: Sequence[LeftOut] = ()

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
