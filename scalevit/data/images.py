"""Bytes to pixels and back. Knows JPEG, PNG and Pillow images; must not know tars, labels or tensors."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from scalevit.data.conversion import jpeg_orientation, to_rgb, turn, upright

KINDS = ("jpg", "jpeg", "png", "webp")
"""Extensions of the images in a shard. An index stores positions in this tuple, so only append to it."""

CONVERTIBLE = ("gif", "bmp", "tif", "tiff")
"""Extensions of images that are written to shards as PNG, on request."""

# Pillow reads over 40 formats, one of them by starting Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP")
_CONVERTIBLE_FORMATS = (*_FORMATS, "GIF", "BMP", "TIFF")
# The limit above which Pillow warns of decompression bombs.
_MAX_PIXELS = 89_478_485
# What can be shrunk before it is stored; takes 3 GB for a moment, unless it is a JPEG.
_MAX_SHRINKABLE = 1_000_000_000
# Resized to a shortest side of 256, an image of 1 x 60,000 would take 12 GB.
_MAX_ASPECT_RATIO = 200


class UndecodableImage(Exception):
    """The bytes cannot be decoded to an image; the message is the reason."""


def decode(payload: bytes, *, orient: bool = True) -> Image.Image:
    """`decode_pixels` as a Pillow image.

    Raises:
        UndecodableImage: with the decoder's reason.
    """
    return _decode(payload, orient, _FORMATS)


def _decode(payload: bytes, orient: bool, formats: tuple[str, ...]) -> Image.Image:
    pixels = _decode_jpeg(payload, orient)
    return _decode_with_pillow(payload, orient, formats) if pixels is None else Image.fromarray(pixels)


def decode_pixels(payload: bytes, *, orient: bool = True) -> np.ndarray:
    """An RGB image from the bytes of a file, as (H, W, 3) uint8. The format follows from the bytes, not from a name.

    simplejpeg decodes to Pillow's pixels in half the time, except for CMYK, and refuses images for which libjpeg only
    warns. Pillow decodes everything that simplejpeg refuses, so the pixels are always Pillow's. `conversion.to_rgb`
    says what becomes of other modes.

    Args:
        orient: turn the image as its EXIF orientation says.

    Raises:
        UndecodableImage: with the decoder's reason; also for sizes above the limits, which are not decoded.
    """
    pixels = _decode_jpeg(payload, orient)
    return np.array(_decode_with_pillow(payload, orient, _FORMATS)) if pixels is None else pixels


def _decode_jpeg(payload: bytes, orient: bool) -> np.ndarray | None:
    if payload[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(payload, strict=True)
        check_size(width, height)
        if colorspace not in ("YCbCr", "Gray", "RGB"):
            return None
        pixels = simplejpeg.decode_jpeg(payload, "RGB", strict=True)
    except ValueError:
        return None
    orientation = jpeg_orientation(payload) if orient else 1
    return pixels if orientation == 1 else turn(pixels, orientation)


def _decode_with_pillow(payload: bytes, orient: bool, formats: tuple[str, ...]) -> Image.Image:
    with open_image(payload, formats=formats) as image:
        return to_rgb(upright(image) if orient else image)


def check_size(width: int, height: int, limit: int = _MAX_PIXELS) -> None:
    """Refuses images that would take too much memory or time to decode, or to resize by the shortest side.

    Args:
        limit: of their pixels.

    Raises:
        UndecodableImage: with the size.
    """
    if width * height > limit:
        raise UndecodableImage(f"{width} x {height} = {width * height} pixels, limit is {limit}")
    if max(width, height) > _MAX_ASPECT_RATIO * max(min(width, height), 1):
        raise UndecodableImage(f"{width} x {height}: one side is over {_MAX_ASPECT_RATIO} times the other")


def check_whole(payload: bytes) -> None:
    """Checks that an image can be decoded to its end; a JPEG at an eighth of its size, which reads all of it.

    Raises:
        UndecodableImage: as `decode`.
    """
    if payload[:2] == b"\xff\xd8":
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(payload, strict=True)
            check_size(width, height)
            simplejpeg.decode_jpeg(payload, "GRAY", min_factor=8, strict=True)
            return
        except ValueError:
            pass  # CMYK, or a warning of libjpeg's that Pillow overlooks
    with open_image(payload) as image:
        to_rgb(image)


def to_png(payload: bytes) -> bytes:
    """An image of one of `CONVERTIBLE` (the first, where a file has several) as a PNG file, upright RGB.

    Raises:
        UndecodableImage: as `decode`.
    """
    with open_image(payload, formats=_CONVERTIBLE_FORMATS) as image:
        return encode_png(np.asarray(to_rgb(upright(image))))


def check_header(payload: bytes) -> None:
    """Checks the first bytes only: the format is known and the size can be read.

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
    """How larger images are shrunk before they are stored."""

    side: int
    """Pixels."""
    which: str = "shortest"
    """The side that gets that length: shortest or longest."""
    quality: int = 90
    """Of the JPEG, 1 to 100."""


def shrink(payload: bytes, resize: Resize) -> bytes | None:
    """The image, also one of `CONVERTIBLE`, as a smaller JPEG, upright, or None if it is not larger than requested.

    Images of up to a thousand megapixels are accepted, more than `decode` takes.

    Raises:
        UndecodableImage: as `decode`.
    """
    image = _decode_huge(payload, resize) or _decode(payload, True, _CONVERTIBLE_FORMATS)
    factor = resize.side / (min(image.size) if resize.which == "shortest" else max(image.size))
    if factor >= 1:
        check_size(*image.size)
        return None
    width, height = (max(1, round(side * factor)) for side in image.size)
    file = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=resize.quality)
    return file.getvalue()


def _decode_huge(payload: bytes, resize: Resize) -> Image.Image | None:
    """An image above the limit of `decode`, a JPEG at a fraction of its size; None for others."""
    formats = _CONVERTIBLE_FORMATS
    with _without_pillows_limit(), open_image(payload, formats=formats, limit=_MAX_SHRINKABLE) as image:
        if image.width * image.height <= _MAX_PIXELS:
            return None
        # libjpeg scales by 1/2, 1/4 or 1/8 while it decodes; twice the target keeps the quality.
        scale = 2 * resize.side / (min(image.size) if resize.which == "shortest" else max(image.size))
        image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
        return to_rgb(upright(image))


def kind_of(payload: bytes) -> str | None:
    """The extension that matches the first bytes, one of `KINDS`, or None."""
    if payload[:2] == b"\xff\xd8":
        return "jpg"
    if payload[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP" else None


def convertible_kind_of(payload: bytes) -> str | None:
    """The extension that matches the first bytes, one of `CONVERTIBLE`, or None."""
    if payload[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    return "gif" if payload[:4] == b"GIF8" else "bmp" if payload[:2] == b"BM" else None


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Pillow refuses images of twice `_MAX_PIXELS`; here `check_size` has the limit."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def open_image(
    payload: bytes, *, formats: tuple[str, ...] = _FORMATS, limit: int = _MAX_PIXELS
) -> Iterator[Image.Image]:
    """Opens an image with Pillow and checks its size.

    Args:
        formats: Pillow's names of those that are accepted.
        limit: of the pixels.

    Raises:
        UndecodableImage: for any error of the block too: Pillow's plugins raise OSError, SyntaxError, ValueError,
            struct.error and more for broken files.
    """
    try:
        # Our limit is below the size at which Pillow raises, so its warnings add nothing.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(payload), formats=formats) as image:
                check_size(*image.size, limit)
                yield image
    except UndecodableImage:
        raise
    except UnidentifiedImageError:
        raise UndecodableImage("unknown image format") from None
    except Exception as error:
        raise UndecodableImage(" ".join(str(error).split()) or type(error).__name__) from error
