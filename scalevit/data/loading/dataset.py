"""From a sample's number to its tensor: read, check, decode, augment.

Knows the index, images and a transform; must not know ranks, batches or loaders. The pixels of a training sample
follow from (seed, position, copy) alone, and so does the sample that stands in for a bad one.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from zlib import crc32

import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from scalevit.data.faults import Fault
from scalevit.data.images import UndecodableImage, decode, decode_pixels
from scalevit.data.loading.readers import BadRead, Reader, open_reader
from scalevit.data.shards.index import Index
from scalevit.errors import UserError
from scalevit.randomness import hash64, preserved_random_state, seed_sample

Transform = Callable[[Any], torch.Tensor]

# So many bad samples in a row are no accident.
_ATTEMPTS = 16
# Sets these draws apart from those of the augmentation, whose third number is a copy.
_REPLACEMENT = 1 << 32


class PixelTransform:
    """Base of transforms that take an image as (H, W, 3) uint8 array; all others are given a Pillow image (RGB)."""

    def __call__(self, pixels: Any) -> torch.Tensor:
        raise NotImplementedError


class Shown(NamedTuple):
    """What is shown at an order position."""

    sample: int
    """Number in the index: that of the position, or of the sample in its place."""
    tensors: list[torch.Tensor]
    """One per copy, of the transform's shape."""
    faults: list[Fault]
    """Of the samples that were to be shown and cannot be."""


class ShardDataset(Dataset[tuple[torch.Tensor, int]]):
    """The samples of an index, map-style.

    Args:
        index: of the shards.
        transform: from an RGB image to a tensor; what it raises is a bug and is never counted as a bad image.
        seed: of the augmentation.
        reader: of the shards; by default `reading.open_reader(index)`.
    """

    def __init__(self, index: Index, transform: Transform, seed: int = 0, reader: Reader | None = None) -> None:
        self.index = index
        self.transform = transform
        self.seed = seed
        self.reader = reader or open_reader(index)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, sample: int) -> tuple[torch.Tensor, int]:
        """Image and label of a sample, augmented as the first copy at order position `sample`.

        Raises:
            UserError: the image cannot be read or decoded.
        """
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        shown = self.image(sample)
        if isinstance(shown, Fault):
            raise UserError(str(shown))
        return shown, int(self.index.label[sample])

    def image(self, sample: int) -> torch.Tensor | Fault:
        """A sample's tensor, augmented as the first copy at order position `sample`, or why there is none.

        Raises:
            UserError: the shard is gone, changed or out of reach, which is not the sample's fault.
        """
        image = self._decode(sample)
        return image if isinstance(image, Fault) else self._augment(image, sample, [0])[0]

    def blank(self) -> torch.Tensor:
        """Zeros of the transform's shape."""
        black = Image.new("RGB", (8, 8))
        return torch.zeros_like(self._augment(self._as_input(black), 0, [0])[0])

    def copies(self, sample: int, position: int, copies: Sequence[int]) -> Shown:
        """Augmented copies of one decoded image; the generators of this process are left as they were.

        A bad sample is replaced by another, drawn by (seed, position) from the whole set.

        Args:
            sample: number in the index.
            position: where the order shows it, which seeds the augmentation.
            copies: numbers of the copies.

        Raises:
            UserError: the shard is gone, changed or out of reach, or the replacements are bad as well.
        """
        faults: list[Fault] = []
        for attempt in range(_ATTEMPTS):
            image = self._decode(sample)
            if not isinstance(image, Fault):
                return Shown(sample, self._augment(image, position, copies), faults)
            faults.append(image)
            sample = hash64(self.seed, position, _REPLACEMENT + attempt) % len(self)
        raise UserError(f"{faults[0]}; {_ATTEMPTS - 1} samples tried in its place are bad too")

    def _augment(self, image: Any, position: int, copies: Sequence[int]) -> list[torch.Tensor]:
        tensors = []
        # A worker's generators serve nothing else.
        with preserved_random_state() if get_worker_info() is None else nullcontext():
            for copy in copies:
                seed_sample(self.seed, position, copy)
                tensors.append(self.transform(image))
        return tensors

    def _decode(self, sample: int) -> Any:
        """The transform's input, or a Fault. The one place where a bad image comes to light."""
        try:
            payload = self.read(sample)
            expected = int(self.index.crc32[sample])
            if expected >= 0 and crc32(payload) != expected:
                return self.index.fault(sample, "the image's bytes have changed (wrong checksum)")
            return decode_pixels(payload) if isinstance(self.transform, PixelTransform) else decode(payload)
        except BadRead as error:
            return self.index.fault(sample, str(error))
        except UndecodableImage as error:
            return self.index.fault(sample, f"the image cannot be decoded ({error})")

    def _as_input(self, image: Image.Image) -> Any:
        if isinstance(self.transform, PixelTransform):
            import numpy as np

            return np.array(image)
        return image

    def read(self, sample: int) -> bytes:
        """The encoded image of a sample, as it is in the shard.

        Raises:
            BadRead: this sample's bytes cannot be had.
            UserError: the shard is gone, changed or out of reach.
        """
        return self.reader.read(sample)
