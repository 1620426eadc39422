"""Data sets that are written as shards when they are missing, without a download.

scikit-learn's handwritten digits (UCI, 1,797 grey images of 8 x 8) need nothing; Fashion-MNIST (Xiao et al. 2017,
arXiv:1708.07747; 70,000 grey images of 28 x 28) and others in MNIST's form are files of this machine. Knows these sets
and the writer of shards; must not know torch.
"""

import glob
import os
import shutil
from pathlib import Path
from typing import Literal

import numpy as np

from scalevit.data.images import encode_png
from scalevit.data.order.shuffle import permutation
from scalevit.data.writing.sources.base import Sample, Source
from scalevit.data.writing.sources.classes import ClassSettings
from scalevit.data.writing.sources.idx import IdxSource
from scalevit.data.writing.sources.memory import MemorySource
from scalevit.data.writing.writer import WriteSettings, write_shards
from scalevit.errors import SettingError, UserError
from scalevit.files import lock

Builtin = Literal["digits", "fashion-mnist", "idx"]
Part = Literal["train", "validation"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has its files."""

_SHARD_SIZE = {"digits": 256, "fashion-mnist": 2500, "idx": 2500}
_VALIDATION_EVERY = 5
_FASHION_CLASSES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


def ensure_builtin(
    name: Builtin,
    train: str | os.PathLike[str],
    validation: str | os.PathLike[str],
    files: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a data set as shards of PNG, unless the folders have shards.

    Any number of processes may call it at once: one writes, the others wait for it. A folder gets its name when it is
    complete, so an interrupted one is written again.

    Args:
        name: digits: 1,437 for training and 360 for validation. fashion-mnist: 60,000 and 10,000. idx: another set in
            MNIST's form.
        train: folder of the training shards.
        validation: folder of the validation shards.
        files: folder of MNIST's four files, gzipped or not; None for where a system's package has them.

    Raises:
        UserError: a folder holds other files, or cannot be written.
        SettingError: `builtin_files`: the files are not there.
    """
    parts: tuple[tuple[Part, Path], ...] = (("train", Path(train)), ("validation", Path(validation)))
    for part, folder in parts:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{name} at {folder}: is not a folder")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            held = lock(folder.with_name(f".{folder.name}.lock"), wait=True)
        except OSError as error:
            if _has_shards(folder):
                continue  # written by another user, in a place that is read-only here
            raise UserError(f"{name} at {folder}: cannot be written ({error.strerror})") from None
        with held:
            if not _has_shards(folder):
                source, seed = _source(name, part, None if files is None else Path(files))
                shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
                write_shards(source, folder, WriteSettings(_SHARD_SIZE[name], seed=seed, check="none"))


def _source(name: Builtin, part: Part, files: Path | None) -> tuple[Source, int | None]:
    """The samples, and the seed of their shuffle; None where they are shuffled already."""
    if name == "digits":
        return MemorySource(digits()[part], [str(digit) for digit in range(10)]), None
    names = _FASHION_CLASSES if name == "fashion-mnist" else None
    return IdxSource(*_idx_files(name, part, files), ClassSettings(names=names)), 0


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


def _idx_files(name: Builtin, part: Part, files: Path | None) -> tuple[Path, Path]:
    """Images and labels of a part, named as in MNIST, Fashion-MNIST, KMNIST and EMNIST (train-images-idx3-ubyte.gz).

    Raises:
        SettingError: they are not there.
    """
    folder = files or FASHION_MNIST
    if files is None and (name != "fashion-mnist" or not folder.is_dir()):
        package = "install the package dataset-fashion-mnist (Debian, Ubuntu), or " if name == "fashion-mnist" else ""
        raise SettingError("builtin_files", None, f"{package}name a folder with the IDX files of {name}")
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        matches = [path for path in sorted(folder.glob(f"*{kind}*")) if ("train" in path.name) == (part == "train")]
        if len(matches) != 1:
            names = ", ".join(path.name for path in matches) or "none"
            raise SettingError(
                "builtin_files", str(folder), f"must be a folder with one file *{kind}* for {part} (found: {names})"
            )
        found += matches
    return found[0], found[1]


def _has_shards(folder: Path) -> bool:
    return bool(glob.glob(os.path.join(glob.escape(os.fspath(folder)), "*.tar")))
