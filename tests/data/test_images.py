import io
import zlib

import numpy as np
import pytest
from PIL import Image

from scalevit.data.images import UndecodableImage, check_header, decode, decode_pixels


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
PICTURE = Image.fromarray(NOISE).resize((62, 48), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_jpeg_pixels_are_pillows(mode, options):
    payload = encoded(PICTURE.convert(mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
    image = decode(payload)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)
    np.testing.assert_array_equal(decode_pixels(payload), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA"])
def test_png_of_any_mode(mode):
    image = PICTURE.convert(mode)
    np.testing.assert_array_equal(np.asarray(decode(encoded(image, "PNG"))), np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(decode_pixels(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_smallest_images(size, format):
    assert decode(encoded(Image.new("RGB", size, (9, 9, 9)), format)).size == size


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_absurd_shapes_are_refused(format):
    """Resizing its shortest side to 256 would take 12 GB."""
    with pytest.raises(UndecodableImage, match="1 x 60000: one side is over 200 times the other"):
        decode(encoded(Image.new("L", (1, 60_000)), format))


JPEG, PNG = encoded(PICTURE, "JPEG"), encoded(PICTURE, "PNG")


@pytest.mark.parametrize("payload", [b"", b"hello", JPEG[:2], JPEG[:100], JPEG[:-300], PNG[:20], PNG[:-300]])
def test_broken_images_have_a_reason_of_one_line(payload):
    with pytest.raises(UndecodableImage) as caught:
        decode(payload)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_header_bomb_is_refused():
    """20,000 x 20,000 pixels claimed by a few bytes."""
    bomb = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
    bomb[16:24] = (20_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    jpeg = bytearray(JPEG)
    size = jpeg.index(b"\xff\xc0") + 5
    jpeg[size : size + 4] = (20_000).to_bytes(2, "big") * 2
    for payload in (bomb, jpeg):
        for decoder in (decode, decode_pixels, check_header):
            with pytest.raises(UndecodableImage, match="400000000 pixels"):
                decoder(bytes(payload))
