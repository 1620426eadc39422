"""Reassessed labels of validation images (ReaL, arXiv:2006.07159): several for an image, or none. Knows an index."""

import json
import os
import re
from contextlib import closing
from pathlib import Path

import numpy as np

from scalevit.data.shards import tar
from scalevit.data.shards.index import Index
from scalevit.data.storage.files import open_shard
from scalevit.errors import SettingError

# In the names of ImageNet's validation images: "ILSVRC2012_val_00000293".
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


def read_real_labels(index: Index, path: str | os.PathLike[str], num_classes: int) -> np.ndarray:
    """The labels of each sample, found by its key, which is read from its shard.

    Args:
        index: of the validation set.
        path: JSON file: a list with the lists of labels of ImageNet's images 1, 2, ..., which are found by the number
            in a key; or an object with them by key.
        num_classes: labels are below it.

    Returns:
        (N, L) int64, filled up with -1; a sample that the file has no labels of is -1 only.

    Raises:
        SettingError: `real_labels`: the file cannot be read, is not of this form, names none of the samples, or gives
            one a label that is not a class.
        UserError: a shard cannot be read.
    """
    content, keys = _read(path), _keys(index)
    if isinstance(content, list):
        known = dict(enumerate(content, 1))
        found, how = [known.get(_number_in(key), []) for key in keys], "ImageNet's numbers (ILSVRC2012_val_00000001)"
    else:
        found, how = [content.get(key, []) for key in keys], "key"
    if not any(found):
        raise SettingError("real_labels", str(path), f"has labels for none of the validation images, by {how}")
    for key, labels in zip(keys, found, strict=True):
        if labels and max(labels) >= num_classes:
            reason = f"label {max(labels)} of {key} is not in 0..{num_classes - 1}, the classes of the model"
            raise SettingError("real_labels", str(path), reason)
    table = np.full((len(found), max(map(len, found))), -1, np.int64)
    for row, labels in zip(table, found, strict=True):
        row[: len(labels)] = labels
    return table


def _read(path: str | os.PathLike[str]) -> list[list[int]] | dict[str, list[int]]:
    """Of ImageNet's images in their order, or by key."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise SettingError("real_labels", str(path), f"cannot be read ({error.strerror})") from None
    except ValueError:
        raise SettingError("real_labels", str(path), "is not JSON") from None
    if not isinstance(content, list | dict):
        raise SettingError("real_labels", str(path), "must be a list or an object of lists of labels")
    for key, labels in enumerate(content, 1) if isinstance(content, list) else content.items():
        if not isinstance(labels, list) or not all(type(label) is int and label >= 0 for label in labels):
            raise SettingError("real_labels", str(path), f"the labels of {key} must be a list of integers from 0")
    return content


def _number_in(key: str) -> int:
    """0: it has none."""
    number = _NUMBER.search(key)
    return int(number[1]) if number else 0


def _keys(index: Index) -> list[str]:
    keys = [""] * len(index)
    for number, shard in enumerate(index.shards):
        with closing(open_shard(shard.path)) as file:
            for sample in np.flatnonzero(index.shard == number):
                keys[sample] = tar.key_before(file, int(index.offset[sample]))
    return keys
