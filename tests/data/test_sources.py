import os
import sys
import tarfile

import pytest
import torchvision
import webdataset
from PIL import Image
from timm.data import create_dataset
from timm.utils.misc import natural_key

from scalevit.data.images import Resize
from scalevit.data.shards.index import load_index
from scalevit.data.shards.labels import LabelFormat
from scalevit.data.writing.sources.classes import ClassSettings, sorted_classes
from scalevit.data.writing.sources.datasets import DatasetsSource
from scalevit.data.writing.sources.files import image_folder as read_folder
from scalevit.data.writing.sources.files import table_file
from scalevit.data.writing.sources.shards import ShardSource
from scalevit.data.writing.writer import WriteSettings, write_image_folder, write_samples, write_shards
from scalevit.errors import UserError

NUMBERED = [(f"n{number}", "png", b"%d" % number, number) for number in range(12)]


DIGITS = [str(digit) for digit in range(12)]
MIXED = ["n10", "N9", "n1", "a", "B", "01", "1", "x2y10", "x2y9", ""]


def test_class_orders_are_those_of_torchvision_and_timm(tmp_path):
    assert sorted_classes(DIGITS, "torchvision") == ["0", "1", "10", "11", *DIGITS[2:10]]
    assert sorted_classes(DIGITS, "natural") == DIGITS
    assert sorted_classes(MIXED, "torchvision") == sorted(MIXED)
    assert sorted_classes(MIXED, "natural") == sorted(sorted(MIXED), key=natural_key)
    for name in DIGITS:
        (tmp_path / name).mkdir()
        Image.new("L", (1, 1), int(name)).save(tmp_path / name / f"{name}.png")
    default, torchvisions = read_folder(tmp_path), torchvision.datasets.ImageFolder(tmp_path)
    assert default.classes == torchvisions.classes
    assert [(file.path, file.label) for file in default.files] == torchvisions.samples
    natural, timms = read_folder(tmp_path, ClassSettings("natural")), create_dataset("", root=str(tmp_path))
    assert natural.classes == list(timms.reader.class_to_idx)
    assert {(file.path, file.label) for file in natural.files} == set(timms.reader.samples)
    assert natural.fingerprint() != default.fingerprint()


def test_table_file(image_folder, tmp_path):
    paths = sorted(image_folder.rglob("*.*"))[:4]
    rows = [f"{os.path.relpath(path, tmp_path)},{label}" for path, label in zip(paths, "zaza", strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    source = table_file(tmp_path / "list.csv")
    assert source.classes == ["a", "z"]
    assert [source.load(n)[2:] for n in range(4)] == [
        (path.read_bytes(), label) for path, label in zip(paths, [1, 0, 1, 0], strict=True)
    ]
    (tmp_path / "list.csv").write_text("\n".join(["note,label,path", f"x,-3,{paths[0]}", f"y,40,{paths[1]}"]))
    source = table_file(tmp_path / "list.csv")
    assert ([source.load(n)[3] for n in range(2)], source.classes) == ([-3, 40], None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.png,1\n", r'^path_column = "path": .*list\.csv has the columns a\.png, 1'),
        ("path,Label\na.png,1\n", r'^label_column = "label": .* has the columns path, Label; nearest: Label$'),
        ("path,label\n", "names no images"),
        ("path,label\na.png,\n", "line 2: no label"),
        ("path,label\na.gif,1\n", "names no images"),
        (None, "cannot be read"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    if content is not None:
        (tmp_path / "list.csv").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        table_file(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)


def test_shards_of_others_written_anew(shards, tmp_path):
    """A set of three shards to one of six, through webdataset's own writer and with JSON labels."""
    samples = list(webdataset.WebDataset([str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=False))
    (tmp_path / "foreign").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "foreign" / "%03d.tar"), maxcount=9, verbose=0) as writer:
        for sample in samples:
            kind = next(kind for kind in ("jpg", "jpeg", "png") if kind in sample)
            writer.write(
                {"__key__": f"x/{sample['__key__']}", kind: sample[kind], "json": {"class": int(sample["cls"])}}
            )
    write_shards(
        ShardSource(str(tmp_path / "foreign"), LabelFormat("class")), tmp_path / "new", WriteSettings(4), workers=1
    )
    old, new = load_index(shards), load_index(tmp_path / "new")
    assert len(new.shards) == 6
    assert sorted(zip(new.crc32, new.label, strict=True)) == sorted(zip(old.crc32, old.label, strict=True))


def test_shards_with_bad_samples_are_not_written_anew(tmp_path):
    write_samples(NUMBERED[:3], tmp_path / "set")
    path = tmp_path / "set" / "shard-000000.tar"
    with tarfile.open(path) as tar:
        second = tar.getmembers()[2].offset_data
    content = bytearray(path.read_bytes())
    content[second] ^= 1
    path.write_bytes(content)
    source = ShardSource(str(tmp_path / "set"))
    source.load(0)
    with pytest.raises(UserError, match=r"key 'n1', offset .*wrong checksum"):
        source.load(1)


def test_datasets_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"'datasets' is not installed; install the extra: pip install 'scalevit\[datasets\]'"
    ):
        DatasetsSource.from_disk(str(tmp_path))


def make_bad_source(kind, folder):
    if kind == "missing":
        return
    folder.mkdir()
    if kind == "empty":
        return
    (folder / "ant").mkdir()
    if kind == "empty class":
        return
    Image.new("RGB", (4, 4)).save(folder / "ant" / "1.jpg")
    if kind == "not an image":
        (folder / "ant" / "2.png").write_text("hello")


@pytest.mark.parametrize(("workers", "shortest_side"), [(0, None), (0, 2), (1, None)])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "images at .*source: no such folder"),
        ("empty", "images at .*source: no images in subfolders"),
        ("empty class", "images at .*source: no images in subfolders"),
        ("not an image", r"image .*2\.png: cannot be decoded \(unknown image format\)"),
    ],
)
def test_bad_sources(tmp_path, kind, message, workers, shortest_side):
    make_bad_source(kind, tmp_path / "source")
    resize = Resize(shortest_side) if shortest_side else None
    with pytest.raises(UserError, match=message) as caught:
        write_image_folder(tmp_path / "source", tmp_path / "out", workers=workers, resize=resize)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_csv_class_names_in_either_order(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\na.png,n10\nb.png,n9\nc.png,n10\n")
    assert table_file(tmp_path / "list.csv").classes == ["n10", "n9"]
    source = table_file(tmp_path / "list.csv", ClassSettings("natural"))
    assert (source.classes, [file.label for file in source.files]) == (["n9", "n10"], [1, 0, 1])


def test_links_are_followed_once(tmp_path):
    for name in ("cat", "more"):
        (tmp_path / name).mkdir()
        Image.new("L", (1, 1)).save(tmp_path / name / f"{name}.png")
    (tmp_path / "train").mkdir()
    for name, target in (("cat", "cat"), ("dog", "more")):
        (tmp_path / "train" / name).symlink_to(tmp_path / target)
    (tmp_path / "cat" / "loop").symlink_to(tmp_path / "cat")
    (tmp_path / "cat" / "further").symlink_to(tmp_path / "more")
    source = read_folder(tmp_path / "train")
    names = [os.path.basename(file.path) for file in source.files]
    assert names == ["cat.png", "more.png", "more.png"]


def test_shards_with_bad_samples_are_written_within_a_limit(tmp_path):
    (tmp_path / "set").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "set" / "%03d.tar"), verbose=0) as writer:
        for number, label in enumerate((b"0", b"cat", b"1")):
            writer.write({"__key__": str(number), "png": b"x", "cls": label})
    with pytest.raises(UserError, match=r"1 such samples\): fix or remove them, or allow them by --max-faults"):
        ShardSource(str(tmp_path / "set"))
    source = ShardSource(str(tmp_path / "set"), max_faults=1)
    assert (len(source), [entry.reason for entry in source.left_out]) == (2, ["a sample that cannot be used"])
