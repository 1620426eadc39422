"""From a sample's number to its tensor: read, check, decode, augment.

The pixels of a training sample are determined by (seed, position, copy), and the sample that replaces a bad one by
(seed, position). Knows the index, images and a transform; must not know ranks, batches or loaders.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import copy
from functools import partial
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from scalevit.data.faults import Fault
from scalevit.data.images import UndecodableImage, decode, decode_pixels
from scalevit.data.loading.readers import Reader, SampleReadError, open_reader
from scalevit.data.shards.index import Index
from scalevit.data.transforms.base import ArrayTransform, Transform
from scalevit.errors import UserError
from scalevit.randomness import hash64, preserved_random_state, seed_sample

# More bad samples in a row are not accidental.
_ATTEMPTS = 16
# Separates these draws from those of the augmentation, whose third number is a copy.
_REPLACEMENT = 1 << 32


class AugmentedCopies(NamedTuple):
    """The augmented copies of the sample at an order position."""

    sample: int
    """Number in the index: of the position's sample, or of the one that replaces it."""
    tensors: list[torch.Tensor]
    """One per copy, of the transform's shape."""
    faults: list[Fault]
    """The bad samples that were replaced."""


def decoder_for(transform: Transform, *, exif_orientation: bool = True) -> Callable[[bytes], Any]:
    """Decodes an image to the input of a transform, turned as its EXIF record says."""
    return partial(decode_pixels if isinstance(transform, ArrayTransform) else decode, orient=exif_orientation)


def blank(transform: Transform) -> torch.Tensor:
    """Zeros of the shape that a transform returns; the random generators of this process are not changed."""
    black = Image.new("RGB", (8, 8))
    with preserved_random_state():
        return torch.zeros_like(transform(np.array(black) if isinstance(transform, ArrayTransform) else black))


def images_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The images (3, S, S) of a batch's samples: where the transform gives views (V, 3, S, S), the first ones of all
    samples, then the second ones, ...
    """
    if tensors[0].dim() < 4:
        return list(tensors)
    return [tensor[view] for view in range(len(tensors[0])) for tensor in tensors]


class ShardDataset(Dataset[tuple[torch.Tensor, int]]):
    """The samples of an index, map-style.

    Args:
        index: of the shards.
        transform: from an RGB image to a tensor. Its exceptions are bugs and never count as bad images.
        seed: of the augmentation.
        reader: of the shards; by default `readers.open_reader(index)`.
        exif_orientation: turn images as their EXIF records say.
    """

    def __init__(
        self,
        index: Index,
        transform: Transform,
        seed: int = 0,
        reader: Reader | None = None,
        *,
        exif_orientation: bool = True,
    ) -> None:
        self.index = index
        self.transform = transform
        self.seed = seed
        self._exif_orientation = exif_orientation
        self._decoder = decoder_for(transform, exif_orientation=exif_orientation)
        self.reader = reader or open_reader(index)

    def __len__(self) -> int:
        return len(self.index)

    def with_transform(self, transform: Transform) -> "ShardDataset":
        """The same samples through another transform, by the same reader."""
        other = copy(self)
        other.transform, other._decoder = transform, decoder_for(transform, exif_orientation=self._exif_orientation)
        return other

    def __getitem__(self, sample: int) -> tuple[torch.Tensor, int]:
        """Image and label of a sample, with the augmentation of the first copy at order position `sample`.

        Raises:
            UserError: the image cannot be read or decoded.
        """
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        image = self.image(sample)
        if isinstance(image, Fault):
            raise UserError(str(image))
        return image, int(self.index.label[sample])

    def image(self, sample: int) -> torch.Tensor | Fault:
        """A sample's tensor with the augmentation of the first copy at order position `sample`, or its fault.

        Raises:
            UserError: the shard is missing, changed or cannot be reached.
        """
        image = self._decode(sample)
        return image if isinstance(image, Fault) else self._augment(image, sample, [0])[0]

    def blank(self) -> torch.Tensor:
        """Zeros of the transform's shape."""
        return blank(self.transform)

    def copies(self, sample: int, position: int, copies: Sequence[int]) -> AugmentedCopies:
        """Augmented copies of one decoded image; the random generators of this process are not changed.

        A bad sample is replaced by another of the whole set, drawn by (seed, position).

        Args:
            sample: number in the index.
            position: in the order; seeds the augmentation.
            copies: numbers of the copies.

        Raises:
            UserError: the shard is missing, changed or cannot be reached, or the replacements are bad too.
        """
        faults: list[Fault] = []
        for attempt in range(_ATTEMPTS):
            image = self._decode(sample)
            if not isinstance(image, Fault):
                return AugmentedCopies(sample, self._augment(image, position, copies), faults)
            faults.append(image)
            sample = hash64(self.seed, position, _REPLACEMENT + attempt) % len(self)
        raise UserError(f"{faults[0]}; {_ATTEMPTS - 1} replacements are bad too")

    def _augment(self, image: Any, position: int, copies: Sequence[int]) -> list[torch.Tensor]:
        tensors = []
        # In a worker, the generators have no other use.
        with preserved_random_state() if get_worker_info() is None else nullcontext():
            for copy in copies:
                seed_sample(self.seed, position, copy)
                tensors.append(self.transform(image))
        return tensors

    def _decode(self, sample: int) -> Any:
        """The transform's input, or a fault. The only place where bad images are detected."""
        try:
            payload = self.read(sample)
            expected = int(self.index.crc32[sample])
            if expected >= 0 and crc32(payload) != expected:
                return self.index.fault(sample, "the image's bytes have changed (wrong checksum)")
            return self._decoder(payload)
        except SampleReadError as error:
            return self.index.fault(sample, str(error))
        except UndecodableImage as error:
            return self.index.fault(sample, f"the image cannot be decoded ({error})")

    def read(self, sample: int) -> bytes:
        """The encoded image of a sample, as stored in the shard.

        Raises:
            SampleReadError: this sample's bytes cannot be read.
            UserError: the shard is missing, changed or cannot be reached.
        """
        return self.reader.read(sample)
