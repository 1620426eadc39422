"""Data sets that are written as shards when they are missing, without a download.

So far scikit-learn's handwritten digits (UCI, 1,797 grey images of 8 x 8). Knows the digits and the writer of shards;
must not know torch.
"""

import glob
import os
import shutil
from pathlib import Path

import numpy as np

from scalevit.data.images import encode_png
from scalevit.data.order.shuffle import permutation
from scalevit.data.writing.sources.base import Sample
from scalevit.data.writing.writer import write_samples
from scalevit.errors import UserError
from scalevit.files import lock

_SHARD_SIZE = 256
_VALIDATION_EVERY = 5


def ensure_digits(train: str | os.PathLike[str], validation: str | os.PathLike[str]) -> None:
    """Writes 1,437 digits for training and 360 for validation as shards of PNG, unless the folders have shards.

    Any number of processes may call it at once: one writes, the others wait for it. A folder gets its name when it is
    complete, so an interrupted one is written again.

    Raises:
        UserError: a folder holds other files, or cannot be written.
    """
    for part, folder in (("train", Path(train)), ("validation", Path(validation))):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"digits at {folder}: is not a folder")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            held = lock(folder.with_name(f".{folder.name}.lock"), wait=True)
        except OSError as error:
            if _has_shards(folder):
                continue  # written by another user, in a place that is read-only here
            raise UserError(f"digits at {folder}: cannot be written ({error.strerror})") from None
        with held:
            if not _has_shards(folder):
                samples = digits()[part]
                classes = [str(digit) for digit in range(10)]
                shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
                write_samples(samples, folder, shard_size=_SHARD_SIZE, classes=classes)


def digits() -> dict[str, list[Sample]]:
    """The samples of "train" and "validation", in a fixed shuffled order. Every fifth image of those sorted by class is
    held out, so both parts have all classes in proportion.
    """
    from sklearn.datasets import load_digits  # slow to import, and needed only once per machine

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    by_class = np.argsort(labels, kind="stable")
    held_out = np.arange(len(labels)) % _VALIDATION_EVERY == 0
    parts = {"train": by_class[~held_out], "validation": by_class[held_out]}
    return {
        part: [
            (f"digit-{number:04d}", "png", encode_png(pixels[number]), int(labels[number]))
            for number in numbers[permutation(len(numbers), seed=0)]
        ]
        for part, numbers in parts.items()
    }


def _has_shards(folder: Path) -> bool:
    return bool(glob.glob(os.path.join(glob.escape(os.fspath(folder)), "*.tar")))
