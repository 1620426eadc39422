"""What the images of a set are: kinds, modes, sizes and orientations. Reads headers of images; must not decode them."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from scalevit.data.conversion import orientation_of
from scalevit.data.images import UndecodableImage, open_image
from scalevit.data.loading.readers import SampleReadError, open_reader
from scalevit.data.shards.index import Index
from scalevit.terminal import ProgressBar


@dataclass(frozen=True)
class Survey:
    """Of images that were read; arrays are (M,) of those that can be opened."""

    sizes: np.ndarray
    """(M, 2) int64, width and height in pixels as stored."""
    stored_bytes: np.ndarray
    """int64."""
    formats: Counter[str]
    """By Pillow's name of the format and the mode, e.g. "JPEG RGB"."""
    turned: int
    """Images whose EXIF record turns or mirrors them."""
    unreadable: dict[str, str]
    """Reason by key of the images that cannot be opened."""


def survey(index: Index, *, images: int, seed: int = 0) -> Survey:
    """Reads the headers of images, with progress on standard error.

    Args:
        images: how many are read, drawn from all without order; all if there are no more.
        seed: of the draw.

    Raises:
        UserError: a shard is missing, changed or cannot be reached.
    """
    count = min(images, len(index))
    chosen = np.sort(np.random.default_rng(seed).choice(len(index), count, replace=False))
    reader = open_reader(index)
    sizes, stored, formats, turned, unreadable = [], [], Counter[str](), 0, {}
    with ProgressBar("reading images", count, "images") as counter:
        for sample in chosen.tolist():
            try:
                payload = reader.read(sample)
                with open_image(payload) as image:
                    sizes.append(image.size)
                    formats[f"{image.format} {image.mode}"] += 1
                    turned += orientation_of(image) != 1
                stored.append(len(payload))
            except (SampleReadError, UndecodableImage) as error:
                unreadable[index.key(sample)] = str(error)
            counter.advance()
    return Survey(np.array(sizes, np.int64).reshape(-1, 2), np.array(stored, np.int64), formats, turned, unreadable)
