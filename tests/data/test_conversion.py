"""Every mode and orientation becomes upright 8-bit RGB, on the fast way and on Pillow's."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from scalevit.data.conversion import jpeg_orientation, to_rgb
from scalevit.data.images import UndecodableImage, decode, decode_pixels

RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def grey(payload):
    pixels = decode_pixels(payload)
    assert (pixels == pixels[:, :, :1]).all()
    np.testing.assert_array_equal(np.asarray(decode(payload)), pixels)
    return pixels[:, :, 0]


def test_16_bit_images_are_scaled_and_not_cut_off():
    values = np.array([[0, 128, 257], [32768, 65407, 65535]], np.uint16)
    payload = encoded(Image.fromarray(values))
    assert Image.open(io.BytesIO(payload)).mode == "I;16"
    assert grey(payload).tolist() == [[0, 0, 1], [128, 255, 255]]


@pytest.mark.parametrize(("mode", "highest"), [("I", 65535), ("F", 1.0)])
def test_wide_integers_and_floats_have_a_range(mode, highest):
    kind = np.int32 if mode == "I" else np.float32
    image = Image.fromarray(np.array([[0, highest / 2, highest]]).astype(kind))
    assert image.mode == mode
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 127 if mode == "I" else 128, 255]
    for wrong in (-1, highest + 1):
        with pytest.raises(ValueError, match="must be from 0 to"):
            to_rgb(Image.fromarray(np.array([[wrong]]).astype(kind)))


def test_one_bit_and_palette_images():
    bits = Image.fromarray(RAMP > 100)
    assert bits.mode == "1"
    np.testing.assert_array_equal(grey(encoded(bits)), (RAMP > 100) * 255)
    palette = Image.fromarray(RAMP).quantize(8)
    np.testing.assert_array_equal(grey(encoded(palette)), np.asarray(palette.convert("L")))


def test_transparent_pixels_are_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 128, 255)
    assert grey(encoded(Image.fromarray(pixels))).tolist() == [[255, 127, 0]]
    assert grey(encoded(Image.fromarray(pixels[:, :, 2:]))).tolist() == [[255, 127, 0]], "grey with alpha"
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 50, 50, 50])
    palette.putpixel((1, 0), 1)
    assert grey(encoded(palette, transparency=0)).tolist() == [[255, 50]]
    assert grey(encoded(Image.new("RGB", (1, 1), (9, 9, 9)), transparency=(9, 9, 9))).tolist() == [[255]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "CMYK"])
def test_exif_orientation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    exif[ExifTags.Base.Orientation] = orientation
    image = Image.fromarray(RAMP).convert("CMYK" if format == "CMYK" else "RGB").resize((48, 32))
    options = {"lossless": True} if format == "WEBP" else {}
    payload = encoded(image, "JPEG" if format == "CMYK" else format, exif=exif, **options)
    stored = Image.open(io.BytesIO(payload))
    expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(decode_pixels(payload), expected)
    np.testing.assert_array_equal(np.asarray(decode(payload)), expected)
    as_stored = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
    np.testing.assert_array_equal(decode_pixels(payload, orient=False), as_stored)
    assert decode_pixels(payload).flags.c_contiguous


def test_a_damaged_exif_record_counts_as_none():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    payload = bytearray(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif))
    assert jpeg_orientation(bytes(payload)) == 6
    start = payload.index(b"Exif\0\0") + 6
    for damage in (b"\xff" * 8, b"MM\x00\x2a\xff\xff\xff\xff", b"II"):
        payload[start : start + len(damage)] = damage
        assert jpeg_orientation(bytes(payload)) == 1
        assert decode_pixels(bytes(payload)).shape == (4, 8, 3)
    assert jpeg_orientation(b"\xff\xd8\xff") == 1
    assert jpeg_orientation(b"\xff\xd8\xff\xe1\x00\x00") == 1


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_no_images(format):
    """Pillow would read them, whatever the file's name."""
    with pytest.raises(UndecodableImage, match="unknown image format"):
        decode(encoded(Image.new("RGB", (16, 16)), format))


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    called = tmp_path / "called"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {called}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    payload = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(UndecodableImage, match="unknown image format"):
        decode(payload)
    assert not called.exists()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ['tiff:Orientation="{}"', "<tiff:Orientation>{}</tiff:Orientation>"])
def test_xmps_orientation_is_taken_where_exif_has_none(orientation, form):
    """As Pillow does, whichever decoder reads the file."""
    xmp = f"<x:xmpmeta>{form.format(orientation)}</x:xmpmeta>".encode()
    color = Image.fromarray(RAMP).convert("RGB")
    payload = encoded(color, "JPEG", xmp=xmp)
    assert jpeg_orientation(payload) == orientation
    np.testing.assert_array_equal(
        decode_pixels(payload), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(payload))))
    )
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    assert jpeg_orientation(encoded(color, "JPEG", xmp=xmp, exif=exif)) == 3


def test_a_transparent_value_of_16_bits_is_white():
    values = np.array([[0, 514], [65535, 514]], np.uint16)
    payload = encoded(Image.fromarray(values), transparency=514)
    assert Image.open(io.BytesIO(payload)).info["transparency"] == 514
    assert grey(payload).tolist() == [[0, 255], [255, 255]]
