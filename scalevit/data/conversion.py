"""What an image of any mode and orientation is as upright 8-bit RGB. Knows Pillow images; must not know files.

docs/data.md has the table of conversions.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps

_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(=\"|>)([1-8])")
BACKGROUND = (255, 255, 255)
"""White, behind transparent pixels."""
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes as RGB. Its size stays.

    16-bit values are scaled to 8 bits (Pillow's own conversion cuts them off at 255), floats from 0..1. Transparent
    pixels are blended with white (Pillow's own conversion shows the colour that they happen to have).

    Raises:
        ValueError: integers outside 0..65535, or floats outside 0..1.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        grey = _to_8_bits(values, 65535)
        if isinstance(transparent := image.info.get("transparency"), int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image, np.float64), 1.0)).convert("RGB")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        picture = image.convert("RGBA")
        behind = Image.new("RGBA", picture.size, (*BACKGROUND, 255))
        return Image.alpha_composite(behind, picture).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray, highest: float) -> np.ndarray:
    low, high = values.min(initial=0), values.max(initial=0)
    if not (low >= 0 and high <= highest):
        raise ValueError(f"values from {low:g} to {high:g}, must be from 0 to {highest:g}")
    return np.rint(values * (255 / highest)).astype(np.uint8)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Pillow warns of damaged EXIF records; they matter to nobody here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says; a damaged EXIF record counts as none."""
    try:
        with _without_warnings():
            return ImageOps.exif_transpose(image)
    except Exception:  # of any kind: Pillow does not limit what it raises for a damaged record
        return image


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an open image, 1 to 8, or 1 (upright) where it has none."""
    try:
        with _without_warnings():
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as in `upright`
        return 1
    return value if value in range(1, 9) else 1


def jpeg_orientation(payload: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 to 8, or 1 (upright) where it has none. Reads the segments before the image.

    Where EXIF has none, XMP's is taken, as Pillow does.
    """
    position, xmp = 2, 1
    while payload[position : position + 1] == b"\xff":
        marker, size = payload[position + 1 : position + 2], int.from_bytes(payload[position + 2 : position + 4], "big")
        if marker == b"\xff":  # a byte that only fills up
            position += 1
            continue
        if marker == b"\xda" or size < 2:  # the image begins, or the file is damaged
            break
        if marker == b"\xe1" and payload[position + 4 : position + 10] == b"Exif\0\0":
            found = _orientation(payload[position + 4 : position + 2 + size])
            if found is not None:
                return found
        if marker == b"\xe1" and payload[position + 4 : position + 33] == _XMP:
            match = _XMP_ORIENTATION.search(payload, position, position + 2 + size)
            xmp = int(match[2]) if match else xmp
        position += 2 + size
    return xmp


def _orientation(record: bytes) -> int | None:
    """Of an EXIF record; None where it has none."""
    exif = Image.Exif()
    try:
        with _without_warnings():
            exif.load(record)
            value = exif.get(ExifTags.Base.Orientation)
    except Exception:  # as in `upright`
        return 1
    return value if value is None or value in range(1, 9) else 1


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) pixels, stored with an EXIF orientation from 2 to 8, upright. Pillow's transposes are blockwise."""
    return np.array(Image.fromarray(pixels).transpose(_UPRIGHT[orientation]))


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
