"""Hugging Face data sets, Parquet files and IDX files as sources of shards."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalevit.cli.main import main
from scalevit.data import images
from scalevit.data.shards.index import load_index
from scalevit.data.writing.sources.classes import ClassSettings
from scalevit.data.writing.sources.datasets import DatasetsSource
from scalevit.data.writing.sources.idx import IdxSource, is_idx
from scalevit.data.writing.writer import WriteSettings, write_shards
from scalevit.errors import SettingError, UserError

datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")

PNGS = [images.encode_png(np.full((4, 5, 3), 20 * number, np.uint8)) for number in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make(labels, feature, image_feature=None) -> "datasets.Dataset":
    content = {"image": [{"bytes": png, "path": f"{n}.png"} for n, png in enumerate(PNGS)], "label": labels}
    if image_feature is not None:
        content["image"] = PNGS
    features = datasets.Features({"image": image_feature or datasets.Image(), "label": feature})
    # Some versions of datasets and pyarrow cannot hash a table, so it is given a fingerprint.
    table = datasets.table.InMemoryTable.from_pydict(content, schema=features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="0" * 16)


CLASS_LABELS = datasets.ClassLabel(names=["ant", "bee", "cow"])


def test_from_disk(tmp_path):
    path = str(tmp_path / "saved")
    datasets.DatasetDict(
        {"train": make([1, 0, 1, 0, -1, 2], CLASS_LABELS), "b": make([0] * 6, CLASS_LABELS)}
    ).save_to_disk(path)
    with pytest.raises(SettingError, match=r"^split = null: .* has the splits train, b"):
        DatasetsSource.from_disk(path)
    with pytest.raises(SettingError, match=r'^label = "labels": .* has the columns image, label; nearest: label$'):
        DatasetsSource.from_disk(path, "train", label="labels")
    with pytest.raises(SettingError, match=r'^image = "label": .* has no images there'):
        DatasetsSource.from_disk(path, "train", image="label")
    source = DatasetsSource.from_disk(path, "train")
    assert source.classes == ["ant", "bee", "cow"]
    assert [source.load(n)[2:] for n in range(len(source))] == [
        (PNGS[n], label) for n, label in enumerate([1, 0, 1, 0])
    ] + [(PNGS[5], 2)]
    assert [entry.reason for entry in source.left_out] == ["no label"]
    assert source.origin(4).startswith("row 5 of ")
    write_shards(source, tmp_path / "set", WriteSettings(4), workers=1)
    assert len(load_index(tmp_path / "set")) == 5
    assert load_index(tmp_path / "set").classes == ("ant", "bee", "cow")
    assert DatasetsSource.from_disk(path, "train").fingerprint() == source.fingerprint()


def test_class_labels_are_numbered_as_asked(tmp_path):
    path = str(tmp_path / "saved")
    make([1, 0, 1, 0, 2, 2], CLASS_LABELS).save_to_disk(path)
    settings = ClassSettings(names=["insect", "other"], renamed={"ant": "insect", "bee": "insect", "cow": "other"})
    source = DatasetsSource.from_disk(path, classes=settings)
    assert [source.load(n)[3] for n in range(6)] == [0, 0, 0, 0, 1, 1]
    assert source.classes == ["insect", "other"]


@pytest.mark.parametrize("binary", [False, True])
def test_parquet(tmp_path, binary, capsys):
    """With the hub's column of images, and with plain bytes; labels are names."""
    kind = datasets.Value("binary") if binary else None
    rows = make(["z", "a", "z", "a", "b", "b"], datasets.Value("string"), kind)
    (tmp_path / "files").mkdir()
    rows.select(range(4)).to_parquet(tmp_path / "files" / "0.parquet")
    rows.select(range(4, 6)).to_parquet(tmp_path / "files" / "1.parquet")
    source = DatasetsSource.from_parquet(str(tmp_path / "files"))
    assert source.classes == ["a", "b", "z"]
    assert [source.load(n)[2:] for n in range(6)] == list(zip(PNGS, [2, 0, 2, 0, 1, 1], strict=True))
    assert DatasetsSource.from_parquet(str(tmp_path / "files" / "*.parquet")).fingerprint() == source.fingerprint()
    main(
        ["shards", "write", "--parquet", str(tmp_path / "files"), "--destination", str(tmp_path / "set"), "--workers=0"]
    )
    assert load_index(tmp_path / "set").label.tolist().count(0) == 2
    assert "6 samples" in capsys.readouterr().err


def test_a_folder_laid_out_as_on_the_hub(tmp_path):
    (tmp_path / "data").mkdir()
    make([1, 0, 1, 0, 2, 2], CLASS_LABELS).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    source = DatasetsSource.from_hub(str(tmp_path))
    assert (source.classes, len(source)) == (["ant", "bee", "cow"], 6)
    with pytest.raises(SettingError, match=r'^split = "test": .* has the splits train: give one$'):
        DatasetsSource.from_hub(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda folder: DatasetsSource.from_parquet(str(folder / "none*.parquet")), "no such files"),
        (lambda folder: DatasetsSource.from_parquet(str(folder / "bad.parquet")), "bad.parquet: cannot be read"),
        (lambda folder: DatasetsSource.from_disk(str(folder)), "cannot be read"),
        (lambda folder: DatasetsSource.from_hub(str(folder / "no/such")), "no/such: cannot be read"),
    ],
)
def test_bad_data_sets_are_one_line(tmp_path, read, message):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


# --- IDX --------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.mark.parametrize("compressed", [False, True])
def test_idx(tmp_path: Path, compressed: bool, capsys):
    pixels = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    pack = gzip.compress if compressed else bytes
    (tmp_path / "images").write_bytes(pack(idx(pixels)))
    (tmp_path / "labels").write_bytes(pack(idx(np.array([7, 0, 7], np.uint8))))
    source = IdxSource(tmp_path / "images", tmp_path / "labels")
    assert (source.classes, [source.load(n)[3] for n in range(3)]) == (None, [7, 0, 7])
    assert (images.decode_pixels(source.load(1)[2]) == pixels[1, :, :, None]).all()
    (tmp_path / "names").write_text("\n".join("abcdefgh"))
    arguments = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels"), "--workers=0"]
    main(
        [
            "shards",
            "write",
            *arguments,
            "--destination",
            str(tmp_path / "set"),
            "--class-names",
            str(tmp_path / "names"),
        ]
    )
    assert load_index(tmp_path / "set").classes == tuple("abcdefgh")
    assert sorted(load_index(tmp_path / "set").label.tolist()) == [0, 7, 7]


GOOD_IMAGES, GOOD_LABELS = idx(np.zeros((2, 3, 3), np.uint8)), idx(np.zeros(2, np.uint8))


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (GOOD_IMAGES[:-1], GOOD_LABELS, "images: is damaged: it has 33 bytes, not 34"),
        (GOOD_IMAGES, GOOD_LABELS[:6], "labels: is damaged"),
        (GOOD_IMAGES, idx(np.zeros(3, np.uint8)), r"have the shape \(3,\) for 2 images"),
        (GOOD_LABELS, GOOD_LABELS, r"must be \(N, H, W\)"),
        (GOOD_IMAGES, b"0\n1\n", "is no IDX file"),
        (GOOD_IMAGES, gzip.compress(GOOD_LABELS, mtime=0)[:-9], "labels: cannot be read"),
        (GOOD_IMAGES, None, "labels: cannot be read"),
        (idx(np.zeros((0, 3, 3), np.uint8)), idx(np.zeros(0, np.uint8)), r"there are none \(\(0, 3, 3\)\)"),
        (idx(np.zeros((2, 0, 3), np.uint8)), GOOD_LABELS, "there are none"),
        (GOOD_IMAGES, idx(np.array([0, 2], np.uint8)), "label 2 has no name: the file of class names has 2 lines"),
    ],
    # Names of tests must be equal in every process.
    ids=[
        "short images",
        "short labels",
        "other number",
        "no images",
        "no IDX",
        "cut gzip",
        "missing",
        "none",
        "height 0",
        "name",
    ],
)
def test_bad_idx(tmp_path: Path, pixels: bytes, labels: bytes | None, message: str):
    (tmp_path / "images").write_bytes(pixels)
    if labels is not None:
        (tmp_path / "labels").write_bytes(labels)
    with pytest.raises(UserError, match=message) as caught:
        IdxSource(tmp_path / "images", tmp_path / "labels", ClassSettings(names=["a", "b"]))
    assert "\n" not in str(caught.value)


def test_what_is_idx(tmp_path: Path):
    for content, expected in (
        (GOOD_IMAGES, True),
        (gzip.compress(GOOD_LABELS), True),
        (b"", False),
        (b"\x1f\x8b", False),
    ):
        (tmp_path / "file").write_bytes(content)
        assert is_idx(tmp_path / "file") is expected
    assert not is_idx(tmp_path)


def test_other_formats_are_converted_on_request(tmp_path):
    payloads = []
    for form in ("GIF", "BMP", "TIFF"):
        file = io.BytesIO()
        Image.new("L", (4, 4), 7).save(file, form)
        payloads.append(file.getvalue())
    features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.Value("int64")})
    content = {"image": payloads, "label": [0, 1, 2]}
    table = datasets.table.InMemoryTable.from_pydict(content, schema=features.arrow_schema)
    rows = datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="0" * 16)
    with pytest.raises(UserError, match=r"row 0 of x: a \.gif, which --convert writes as \.png"):
        DatasetsSource(rows, "x").load(0)
    write_shards(DatasetsSource(rows, "x", convert=True), tmp_path / "set", WriteSettings())
    assert len(load_index(tmp_path / "set")) == 3
