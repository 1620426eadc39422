"""A folder as people have them: every kind of image and of damage, from `shards write` to the training loader.

docs/data.md has the table; `EXPECTED` is the same.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from scalevit.cli.main import main
from scalevit.data.images import decode_pixels
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.shards.index import load_index
from scalevit.data.transforms.base import TrainingAugmentation
from scalevit.data.transforms.timm_pipeline import TimmTraining

RAMP = np.linspace(0, 255, 48 * 32).reshape(32, 48).astype(np.uint8)
GREY = Image.fromarray(RAMP)

COPIED, PNG, BAD, NO_IMAGE = "copied", "written as .png", "a bad image", "left out"
EXPECTED = {
    "photo.jpg": COPIED,
    "lossless.png": COPIED,
    "picture.webp": COPIED,
    "cmyk.jpg": COPIED,
    "grey.jpg": COPIED,
    "deep.png": COPIED,
    "palette.png": COPIED,
    "transparent.png": COPIED,
    "animated.webp": COPIED,
    "turned.jpg": COPIED,
    "named_wrongly.jpg": COPIED,
    "one_bit.png": COPIED,
    "animated.gif": PNG,
    "bitmap.bmp": PNG,
    "scan.tiff": PNG,
    "empty.jpg": BAD,
    "truncated.jpg": BAD,
    "truncated.png": BAD,
    "huge.png": BAD,
    "text.jpg": BAD,
    "notes.txt": NO_IMAGE,
    ".DS_Store": NO_IMAGE,
    "movie.mp4": NO_IMAGE,
}


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, an empty one, and a file beside them."""
    root = tmp_path_factory.mktemp("mixed") / "source"
    (root / "all").mkdir(parents=True)
    (root / "other").mkdir()
    (root / "nothing").mkdir()
    (root / "readme.md").write_text("hello")
    color = GREY.convert("RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo = encoded(color, "JPEG")
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    content = {
        "photo.jpg": photo,
        "lossless.png": encoded(color, "PNG"),
        "picture.webp": encoded(color, "WEBP"),
        "cmyk.jpg": encoded(color.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(GREY, "JPEG"),
        "deep.png": encoded(deep, "PNG"),
        "palette.png": encoded(color.quantize(16), "PNG"),
        "transparent.png": encoded(Image.merge("RGBA", [*color.split(), GREY]), "PNG"),
        "animated.webp": encoded(color, "WEBP", save_all=True, append_images=[color.rotate(180)]),
        "turned.jpg": encoded(color, "JPEG", exif=exif),
        "named_wrongly.jpg": encoded(color, "PNG"),
        "one_bit.png": encoded(GREY.convert("1"), "PNG"),
        "animated.gif": encoded(color, "GIF", save_all=True, append_images=[color.rotate(180)]),
        "bitmap.bmp": encoded(color, "BMP"),
        "scan.tiff": encoded(deep, "TIFF"),
        "empty.jpg": b"",
        "truncated.jpg": photo[: len(photo) * 2 // 3],
        "truncated.png": encoded(color, "PNG")[:-40],
        "huge.png": encoded(Image.new("1", (12_000, 10_000)), "PNG"),
        "text.jpg": b"hello",
        "notes.txt": b"hello",
        ".DS_Store": b"\0",
        "movie.mp4": b"\0",
    }
    for name, payload in content.items():
        (root / "all" / name).write_bytes(payload)
    (root / "other" / "photo.jpg").write_bytes(photo)
    return root


@pytest.fixture(scope="module")
def written(folder: Path) -> Path:
    destination = folder.parent / "set"
    options = ["--convert", "--max-faults", "5", "--workers", "0"]
    main(["shards", "write", "--source", str(folder), "--destination", str(destination), *options])
    return destination


def outcome(folder: Path, written: Path) -> dict[str, str]:
    """What happened to each file."""
    about = json.loads((written / "set.json").read_text())
    index = load_index(written)
    keys = [index.key(sample).split("-", 1)[1] for sample in range(len(index)) if index.label[sample] == 0]
    found = {}
    for path in (folder / "all").iterdir():
        if any(str(path) in fault["reason"] for fault in about["faults"]):
            found[path.name] = BAD
        elif any(entry["path"] == str(path) for entry in about["left_out"]):
            found[path.name] = NO_IMAGE
        elif path.stem in keys:
            found[path.name] = PNG if path.suffix in (".gif", ".bmp", ".tiff") else COPIED
    return found


def test_what_happens_to_each_file(folder: Path, written: Path) -> None:
    assert outcome(folder, written) == EXPECTED
    about = json.loads((written / "set.json").read_text())
    assert about["classes"] == ["all", "other"]
    beside = [(Path(entry["path"]).name, entry["reason"]) for entry in about["left_out"]]
    assert ("nothing", "a class folder without images") in beside
    assert ("readme.md", "beside the class folders") in beside


def test_the_command_lists_what_it_leaves_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["shards", "write", "--source", str(folder), "--destination", str(tmp_path / "set"), "--workers", "0"]
    main([*arguments, "--max-faults", "5"])
    said = capsys.readouterr().out
    assert "left out: 3 x no image, by its name\n" in said
    assert "left out: 1 x a .gif, which --convert writes as .png\n" in said
    assert f"  {folder / 'all' / 'notes.txt'}\n" in said
    assert "bad images, left out: 5\n" in said
    assert f"  image {folder / 'all' / 'empty.jpg'}: cannot be decoded (unknown image format)\n" in said
    with pytest.raises(SystemExit):
        main([*arguments[:5], str(tmp_path / "strict"), "--workers", "0"])
    assert "cannot be decoded" in capsys.readouterr().err


def test_the_set_is_intact_and_loads(written: Path) -> None:
    main(["shards", "verify", str(written), "--workers", "0"])  # ends the process where it finds a fault
    dataset = ShardDataset(load_index(written), TimmTraining(TrainingAugmentation(image_size=16, mean=(0.5, 0.5, 0.5))))
    for sample in range(len(dataset)):
        image, _ = dataset[sample]
        assert image.shape == (3, 16, 16)


def test_pixels_of_unusual_images(written: Path) -> None:
    dataset = ShardDataset(load_index(written), lambda image: image)
    pixels = {
        dataset.index.key(sample).split("-", 1)[1]: decode_pixels(dataset.read(sample))
        for sample in range(len(dataset))
        if dataset.index.label[sample] == 0
    }
    assert pixels["turned"].shape == (48, 32, 3)
    np.testing.assert_array_equal(pixels["deep"][:, :, 0], RAMP)
    np.testing.assert_array_equal(pixels["scan"][:, :, 0], RAMP)
    assert pixels["transparent"][0, 0].tolist() == [255, 255, 255]
    assert abs(pixels["bitmap"].astype(int) - pixels["animated"].astype(int)).mean() < 12, "the first image"


def test_a_huge_image_can_be_shrunk(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source" / "only"
    source.mkdir(parents=True)
    (source / "huge.png").write_bytes((folder / "all" / "huge.png").read_bytes())
    (source / "huge.jpg").write_bytes(encoded(Image.new("L", (12_000, 9_000), 77), "JPEG"))
    arguments = ["--source", str(source.parent), "--destination", str(tmp_path / "set"), "--workers", "0"]
    main(["shards", "write", *arguments, "--shortest-side", "64"])
    dataset = ShardDataset(load_index(tmp_path / "set"), lambda image: image)
    sizes = sorted(decode_pixels(dataset.read(sample)).shape for sample in range(2))
    assert sizes == [(64, 77, 3), (64, 85, 3)]


def test_shrinking_converts_and_keeps_the_limit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source" / "only"
    source.mkdir(parents=True)
    (source / "huge.tiff").write_bytes(encoded(Image.new("1", (12_000, 10_000)), "TIFF", compression="group4"))
    (source / "small.bmp").write_bytes((folder / "all" / "bitmap.bmp").read_bytes())
    arguments = ["shards", "write", "--source", str(source.parent), "--workers", "0", "--convert"]
    main([*arguments, "--destination", str(tmp_path / "set"), "--shortest-side", "64"])
    dataset = ShardDataset(load_index(tmp_path / "set"), lambda image: image)
    assert sorted(decode_pixels(dataset.read(sample)).shape for sample in range(2)) == [(32, 48, 3), (64, 77, 3)]
    with pytest.raises(SystemExit):  # not smaller than asked for, and larger than a run reads
        main([*arguments, "--destination", str(tmp_path / "large"), "--shortest-side", "11000"])
    assert "12000 x 10000 = 120000000 pixels, limit is" in capsys.readouterr().err
