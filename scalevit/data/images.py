"""Bytes to pixels and back. Knows JPEG, PNG and Pillow images; must not know tars, labels or tensors."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

# What a shard may hold, by member extension; an index stores the place in this tuple.
KINDS = ("jpg", "jpeg", "png", "webp")

# Where Pillow's default protection against decompression bombs begins to warn.
_MOST_PIXELS = 89_478_485


class UndecodableImage(Exception):
    """The bytes are not an image that can be shown; the message is the reason."""


def decode(payload: bytes) -> Image.Image:
    """An RGB image from the bytes of a file, whatever its name says it is.

    simplejpeg gives Pillow's pixels in half the time, but for CMYK, and refuses what libjpeg only warns about. Pillow
    takes what it leaves, and refuses absurd sizes, so the pixels are Pillow's in every case.

    Raises:
        UndecodableImage: with the decoder's reason.
    """
    if payload[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(payload, strict=True)
            if colorspace in ("YCbCr", "Gray", "RGB") and height * width <= _MOST_PIXELS:
                return Image.fromarray(simplejpeg.decode_jpeg(payload, "RGB", strict=True))
        except ValueError:
            pass
    with _open(payload) as image:
        return image.convert("RGB")


def check_header(payload: bytes) -> None:
    """A cheap look at the first bytes: the format is known and the size is readable.

    Raises:
        UndecodableImage: as `decode`.
    """
    with _open(payload):
        pass


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of (H, W) grey or (H, W, 3) RGB uint8 pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def shrink(payload: bytes, shortest_side: int, quality: int) -> bytes | None:
    """The image as a JPEG whose shortest side is `shortest_side` pixels, or None where it is not larger than that.

    Raises:
        UndecodableImage: as `decode`.
    """
    image = decode(payload)
    factor = shortest_side / min(image.size)
    if factor >= 1:
        return None
    width, height = (max(shortest_side, round(side * factor)) for side in image.size)
    file = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


@contextmanager
def _open(payload: bytes) -> Iterator[Image.Image]:
    """Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more for broken files."""
    try:
        with Image.open(io.BytesIO(payload)) as image:
            yield image
    except UnidentifiedImageError:
        raise UndecodableImage("no known image format") from None
    except Exception as error:
        raise UndecodableImage(" ".join(str(error).split()) or type(error).__name__) from error
