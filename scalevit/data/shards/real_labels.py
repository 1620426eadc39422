"""Reassessed labels of validation images (ReaL, arXiv:2006.07159): several for an image, or none. Knows an index."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np

from scalevit.data.shards import tar
from scalevit.data.shards.index import Index
from scalevit.data.storage.files import open_shard
from scalevit.errors import SettingError

# In the names of ImageNet's validation images: "ILSVRC2012_val_00000293".
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


def read_real_labels(index: Index, path: str | os.PathLike[str]) -> np.ndarray:
    """The labels of each sample, found by its key, which is read from its shard.

    Args:
        index: of the validation set.
        path: JSON file: a list with the lists of labels of ImageNet's images 1, 2, ..., or an object with them by key.

    Returns:
        (N, L) int64, filled up with -1; a sample that the file has no labels of is -1 only.

    Raises:
        SettingError: `real_labels`: the file cannot be read, is not of this form, or names none of the samples.
        UserError: a shard cannot be read.
    """
    known = _read(path)
    found = [known.get(key) or known.get(_number_in(key)) or [] for key in _keys(index)]
    if not any(found):
        raise SettingError(
            "real_labels", str(path), "has labels for none of the validation images, by ImageNet's numbers or by key"
        )
    table = np.full((len(found), max(map(len, found))), -1, np.int64)
    for row, labels in zip(table, found, strict=True):
        row[: len(labels)] = labels
    return table


def _read(path: str | os.PathLike[str]) -> Mapping[str, list[int]]:
    """By key, or by ImageNet's number as text."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise SettingError("real_labels", str(path), f"cannot be read ({error.strerror})") from None
    except ValueError:
        raise SettingError("real_labels", str(path), "is not JSON") from None
    known = {str(number): labels for number, labels in enumerate(content, 1)} if isinstance(content, list) else content
    if not isinstance(known, dict):
        raise SettingError("real_labels", str(path), "must be a list or an object of lists of labels")
    for key, labels in known.items():
        if not isinstance(labels, list) or not all(type(label) is int and label >= 0 for label in labels):
            raise SettingError("real_labels", str(path), f"the labels of {key} must be a list of integers from 0")
    return known


def _number_in(key: str) -> str:
    number = _NUMBER.search(key)
    return str(int(number[1])) if number else ""


def _keys(index: Index) -> list[str]:
    keys = [""] * len(index)
    for number, shard in enumerate(index.shards):
        with closing(open_shard(shard.path)) as file:
            for sample in np.flatnonzero(index.shard == number):
                keys[sample] = tar.key_before(file, int(index.offset[sample]))
    return keys
