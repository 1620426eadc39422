"""Bytes to pixels and back. Knows JPEG, PNG and Pillow images; must not know tars, labels or tensors."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

# What a shard may hold, by member extension; an index stores the place in this tuple.
KINDS = ("jpg", "jpeg", "png", "webp")

# Where Pillow's default protection against decompression bombs begins to warn.
_MOST_PIXELS = 89_478_485
# Resized to a shortest side of 256, an image of 1 x 60,000 would take 12 GB.
_LONGEST_OVER_SHORTEST = 200


class UndecodableImage(Exception):
    """The bytes are not an image that can be shown; the message is the reason."""


def decode(payload: bytes) -> Image.Image:
    """As `decode_pixels`, as a Pillow image.

    Raises:
        UndecodableImage: with the decoder's reason.
    """
    pixels = _decode_jpeg(payload)
    return _decode_with_pillow(payload) if pixels is None else Image.fromarray(pixels)


def decode_pixels(payload: bytes) -> np.ndarray:
    """An RGB image from the bytes of a file, whatever its name says it is, as (H, W, 3) uint8.

    simplejpeg gives Pillow's pixels in half the time, but for CMYK, and refuses what libjpeg only warns about. Pillow
    takes what it leaves, so the pixels are Pillow's in every case.

    Raises:
        UndecodableImage: with the decoder's reason; also for absurd sizes, which are not decoded at all.
    """
    pixels = _decode_jpeg(payload)
    return np.array(_decode_with_pillow(payload)) if pixels is None else pixels


def _decode_jpeg(payload: bytes) -> np.ndarray | None:
    if payload[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(payload, strict=True)
        check_size(width, height)
        if colorspace in ("YCbCr", "Gray", "RGB"):
            return simplejpeg.decode_jpeg(payload, "RGB", strict=True)
    except ValueError:
        pass
    return None


def _decode_with_pillow(payload: bytes) -> Image.Image:
    with open_image(payload) as image:
        return image.convert("RGB")


def check_size(width: int, height: int) -> None:
    """Refuses what would take absurd amounts of memory or time to decode, or to resize by its shortest side.

    Raises:
        UndecodableImage: with the size.
    """
    if width * height > _MOST_PIXELS:
        raise UndecodableImage(f"{width} x {height} are {width * height} pixels, more than {_MOST_PIXELS}")
    if max(width, height) > _LONGEST_OVER_SHORTEST * max(min(width, height), 1):
        raise UndecodableImage(f"{width} x {height}: one side is over {_LONGEST_OVER_SHORTEST} times the other")


def check_header(payload: bytes) -> None:
    """A cheap look at the first bytes: the format is known and the size is readable.

    Raises:
        UndecodableImage: as `decode`.
    """
    with open_image(payload):
        pass


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of (H, W) grey or (H, W, 3) RGB uint8 pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Resize:
    """Shrinking of stored images."""

    side: int
    """Pixels."""
    which: str = "shortest"
    """Side that gets that length: shortest or longest."""
    quality: int = 90
    """Of the JPEG, 1 to 100."""


def shrink(payload: bytes, resize: Resize) -> bytes | None:
    """The image as a smaller JPEG, or None where it is not larger than wished.

    Raises:
        UndecodableImage: as `decode`.
    """
    image = decode(payload)
    factor = resize.side / (min(image.size) if resize.which == "shortest" else max(image.size))
    if factor >= 1:
        return None
    width, height = (max(1, round(side * factor)) for side in image.size)
    file = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=resize.quality)
    return file.getvalue()


def kind_of(payload: bytes) -> str | None:
    """The extension that fits the first bytes, one of `KINDS`, or None."""
    if payload[:2] == b"\xff\xd8":
        return "jpg"
    if payload[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP" else None


@contextmanager
def open_image(payload: bytes) -> Iterator[Image.Image]:
    """Pillow's image, of a size that may be decoded.

    Raises:
        UndecodableImage: also for what the block does with the image: Pillow's plugins raise OSError, SyntaxError,
            ValueError, struct.error and more for broken files.
    """
    try:
        # Our limit is below the size at which Pillow begins to raise, and above it warnings say nothing new.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(payload)) as image:
                check_size(*image.size)
                yield image
    except UndecodableImage:
        raise
    except UnidentifiedImageError:
        raise UndecodableImage("no known image format") from None
    except Exception as error:
        raise UndecodableImage(" ".join(str(error).split()) or type(error).__name__) from error
