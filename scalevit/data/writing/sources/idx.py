"""IDX files as a source: the format of MNIST, Fashion-MNIST and EMNIST, in pairs of images and labels.

Source of the format: "FILE FORMATS FOR THE MNIST DATABASE" on MNIST's page.
"""

import gzip
import math
import os
from collections.abc import Sequence

import numpy as np

from scalevit.data.images import encode_png
from scalevit.data.writing.sources.base import LeftOut, Sample, short_digest, unique_key
from scalevit.data.writing.sources.classes import ClassSettings
from scalevit.errors import UserError

_UNSIGNED_BYTES = 8
_GZIP = b"\x1f\x8b"


def is_idx(path: str | os.PathLike[str]) -> bool:
    """Whether a file, which may be compressed by gzip, begins as an IDX file does."""
    if not os.path.isfile(path):
        return False
    try:
        with _open(path) as file:
            start = file.read(3)
    except (OSError, EOFError):
        return False
    return start == bytes([0, 0, _UNSIGNED_BYTES])


class IdxSource:
    """Images and labels of two IDX files of unsigned bytes, compressed by gzip or not.

    Images are (N, H, W) grey or (N, H, W, 3) RGB, and are written as PNG. EMNIST's are transposed in its files, and
    stay as they are.

    Args:
        images: file of the images.
        labels: file of the labels.
        classes: `names` are those of the labels 0, 1, ...

    Raises:
        UserError: a file cannot be read or is damaged, the two do not belong together, or a label has no name.
    """

    left_out: Sequence[LeftOut] = ()

    def __init__(
        self, images: str | os.PathLike[str], labels: str | os.PathLike[str], classes: ClassSettings | None = None
    ) -> None:
        self._path, self._pixels, values = images, _read(images), _read(labels)
        if self._pixels.ndim not in (3, 4) or (self._pixels.ndim == 4 and self._pixels.shape[3] != 3):
            raise UserError(f"images {images}: must be (N, H, W) or (N, H, W, 3), not {self._pixels.shape}")
        if 0 in self._pixels.shape:
            raise UserError(f"images {images}: there are none ({self._pixels.shape})")
        if values.shape != self._pixels.shape[:1]:
            raise UserError(f"labels {labels}: have the shape {values.shape} for {len(self._pixels)} images")
        self.classes: Sequence[str] | None
        self.classes, self._labels = (classes or ClassSettings()).labelled([str(value) for value in values])

    def __len__(self) -> int:
        return len(self._labels)

    def load(self, number: int) -> Sample:
        return unique_key(number, ""), "png", encode_png(self._pixels[number]), self._labels[number]

    def origin(self, number: int) -> str:
        return f"{number} of {self._path}"

    def fingerprint(self) -> str:
        return short_digest([short_digest([self._pixels.tobytes().hex()]), str(self._labels), str(self.classes)])


def _open(path: str | os.PathLike[str]) -> gzip.GzipFile:
    with open(path, "rb") as file:
        compressed = file.read(2) == _GZIP
    return gzip.open(path) if compressed else open(path, "rb")  # type: ignore[return-value]


def _read(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of a file: two zero bytes, the type, the number of dimensions, their sizes (big-endian), the values."""
    try:
        with _open(path) as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if content[:3] != bytes([0, 0, _UNSIGNED_BYTES]) or len(content) < 4:
        raise UserError(f"{path}: is no IDX file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4))
    if len(content) != start + math.prod(shape):
        raise UserError(f"{path}: is damaged: it has {len(content)} bytes, not {start + math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
