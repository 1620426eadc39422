"""A small real data set that needs no download: scikit-learn's handwritten digits (UCI, 1,797 grey images of 8 x 8).

Knows the digits and the writer of shards; must not know torch.
"""

import fcntl
import glob
import os
import shutil
from pathlib import Path

import numpy as np

from scalevit.data.images import encode_png
from scalevit.data.order.shuffle import permutation
from scalevit.data.writing.sources import Sample
from scalevit.data.writing.writer import write_samples
from scalevit.errors import UserError

_SHARD_SIZE = 256
_VALIDATION_EVERY = 5


def ensure_digits(train: str | os.PathLike[str], validation: str | os.PathLike[str]) -> None:
    """Writes 1,437 digits for training and 360 for validation as shards of PNG, wherever there are none yet.

    Any number of processes may call it at once: one writes, the others wait for it. A folder appears under its name
    only when complete, so whatever was interrupted is written anew.

    Raises:
        UserError: a folder that holds something else, or cannot be written.
    """
    for part, folder in (("train", Path(train)), ("validation", Path(validation))):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if _has_shards(folder):
                continue  # written by somebody else, in a place that is read-only here
            raise UserError(f"digits at {folder}: cannot be written ({error.strerror})") from None
        try:
            # Held until closed, also by a process that is killed. The file stays: removing it would race.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _has_shards(folder):
                samples = digits()[part]
                classes = [str(digit) for digit in range(10)]
                shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
                write_samples(samples, folder, shard_size=_SHARD_SIZE, classes=classes)
        finally:
            os.close(lock)


def digits() -> dict[str, list[Sample]]:
    """The samples of "train" and "validation", shuffled; always the same. Every fifth image of those sorted by class
    is held out, so both parts have all classes in proportion.
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
