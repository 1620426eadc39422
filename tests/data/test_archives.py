"""ImageNet's official archives in miniature, with generated images, through the documented commands."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from scalevit.cli.main import main
from scalevit.data.shards.index import load_index
from scalevit.data.writing.sources.archives import class_archives, flat_images
from scalevit.errors import UserError

# Numbers of the development kit, which are not in the order of the names.
SYNSETS = {"n01440764": 2, "n01443537": 3, "n02119789": 1}
TRUTH = [3, 1, 2, 1, 3]
"""Of the validation images, in the order of their names."""


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (value, value, value)).save(file, "JPEG")
    return file.getvalue()


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both archives and the development kit."""
    folder = tmp_path_factory.mktemp("imagenet")
    classes = {
        f"{name}.tar": tar({f"{name}_{number}.JPEG": jpeg(40 * label + number) for number in (18, 7)})
        for label, name in enumerate(SYNSETS)
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    validation = {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(200 + n) for n in (3, 1, 5, 2, 4)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(validation))
    records = np.zeros(3, [("ILSVRC2012_ID", object), ("WNID", object)])
    for place, (name, number) in enumerate(SYNSETS.items()):
        records[place] = (number, name)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": records.reshape(-1, 1)})
    data = "ILSVRC2012_devkit_t12/data"
    kit = {
        f"{data}/meta.mat": meta.getvalue(),
        f"{data}/ILSVRC2012_validation_ground_truth.txt": "".join(f"{n}\n" for n in TRUTH).encode(),
    }
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar(kit, "w:gz"))
    return folder


def labelled(folder: Path) -> list[tuple[int, int]]:
    """The grey value and the label of each image of a set."""
    index = load_index(folder)
    found = []
    for sample in range(len(index)):
        with open(index.shards[index.shard[sample]].path, "rb") as file:
            file.seek(index.offset[sample])
            pixel = Image.open(io.BytesIO(file.read(index.size[sample]))).getpixel((0, 0))
        found.append((pixel[0], int(index.label[sample])))
    return sorted(found)


VALIDATION = [(201, 1), (202, 2), (203, 0), (204, 2), (205, 1)]


def test_the_official_archives(imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write = ["shards", "write", "--workers", "0", "--destination"]
    main([*write, str(tmp_path / "train"), "--class-archives", str(imagenet / "ILSVRC2012_img_train.tar")])
    kit = str(imagenet / "ILSVRC2012_devkit_t12.tar.gz")
    images = str(imagenet / "ILSVRC2012_img_val.tar")
    main([*write, str(tmp_path / "validation"), "--images", images, "--labels", kit])
    said = capsys.readouterr().out
    assert said.count("labels of the 3 classes (all in set.json): 0 = n01440764, 1 = n01443537, 2 = n02119789") == 2
    assert labelled(tmp_path / "train") == [(7, 0), (18, 0), (47, 1), (58, 1), (87, 2), (98, 2)]
    assert labelled(tmp_path / "validation") == VALIDATION
    assert load_index(tmp_path / "train").classes == load_index(tmp_path / "validation").classes == tuple(SYNSETS)


def test_unpacked_and_with_other_lists_of_labels(imagenet: Path, tmp_path: Path) -> None:
    images, kit = tmp_path / "val", tmp_path / "kit"
    for archive, folder in (("ILSVRC2012_img_val.tar", images), ("ILSVRC2012_devkit_t12.tar.gz", kit)):
        with tarfile.open(imagenet / archive) as file:
            file.extractall(folder, filter="data")
    (images / ".DS_Store").write_bytes(b"x")
    names = {number: name for name, number in SYNSETS.items()}
    rows = [(f"ILSVRC2012_val_{n:08d}", names[number]) for n, number in enumerate(TRUTH, 1)]
    kaggle = tmp_path / "LOC_val_solution.csv"
    heading = "ImageId,PredictionString\n"
    kaggle.write_text(heading + "".join(f"{image},{name} 85 1 499 272 1 1 9 9\n" for image, name in rows))
    columns = tmp_path / "columns.txt"
    columns.write_text("".join(f"{image}.JPEG {name}\n" for image, name in rows))
    expected = [label for _, label in VALIDATION]
    for labels in (kit, kaggle, columns):
        source = flat_images(images, labels)
        assert [source.load(n)[3] for n in range(5)] == expected
        assert [entry.reason for entry in source.left_out] == ["no image, by its name"]


def test_a_folder_with_a_tar_per_class(imagenet: Path, tmp_path: Path) -> None:
    """ImageNet-21k's layout."""
    with tarfile.open(imagenet / "ILSVRC2012_img_train.tar") as file:
        file.extractall(tmp_path, filter="data")
    (tmp_path / "empty.tar").write_bytes(tar({"readme.txt": b"hello"}))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "._n01440764.tar").write_bytes(b"of macOS")
    source = class_archives(tmp_path)
    whole = class_archives(imagenet / "ILSVRC2012_img_train.tar")
    assert [source.load(n) for n in range(6)] == [whole.load(n) for n in range(6)]
    assert source.classes == whole.classes == list(SYNSETS)
    assert {entry.reason for entry in source.left_out} == {
        "no image, by its name",
        "a tar without images",
        "no .tar, by its name",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"no tar", "cannot be read"),
        (tar({"a.txt": b"x"}), "no tars with images in them"),
        (tar({"a.tar": b"no tar" * 200}), "archive a.tar: cannot be read"),
        (tar({"a.tar": tar({"1.jpg": jpeg(1)})[:700]})[:1500], "a.tar.*(damaged|cannot be read)"),
    ],
)
def test_bad_archives(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "train.tar").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        class_archives(tmp_path / "train.tar")
    assert "\n" not in str(caught.value)


def test_an_archive_that_ends_early_is_refused(imagenet: Path, tmp_path: Path) -> None:
    content = (imagenet / "ILSVRC2012_img_val.tar").read_bytes()
    with tarfile.open(imagenet / "ILSVRC2012_img_val.tar") as file:
        last = file.getmembers()[-1]
    (tmp_path / "val.tar").write_bytes(content[: last.offset_data + 20])
    with pytest.raises(UserError, match=r"val\.tar: is damaged \(unexpected end of data\); copy it again"):
        flat_images(tmp_path / "val.tar", imagenet / "ILSVRC2012_devkit_t12.tar.gz")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("a b\n", "have none for image ILSVRC2012_val_00000001"),
        ("ILSVRC2012_val_00000001\n", "line 1: image ILSVRC2012_val_00000001 has no class"),
        (
            "ILSVRC2012_val_00000001 a\nILSVRC2012_val_00000001 b\n",
            "line 2: image ILSVRC2012_val_00000001 is 'b' here and 'a' before",
        ),
        (None, "cannot be read"),
    ],
)
def test_bad_lists_of_labels(imagenet: Path, tmp_path: Path, labels: str | None, message: str) -> None:
    if labels is not None:
        (tmp_path / "labels.txt").write_text(labels)
    with pytest.raises(UserError, match=message):
        flat_images(imagenet / "ILSVRC2012_img_val.tar", tmp_path / "labels.txt")


def test_a_kit_of_other_images_is_refused(imagenet: Path, tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg(1))
    with pytest.raises(UserError, match="name 5 images, but there are 1"):
        flat_images(tmp_path, imagenet / "ILSVRC2012_devkit_t12.tar.gz")
    (tmp_path / "kit").mkdir()
    with pytest.raises(UserError, match="have no ILSVRC2012_validation_ground_truth"):
        flat_images(tmp_path, tmp_path / "kit")


def test_images_without_labels_are_one_line(imagenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shards", "write", "--images", str(imagenet), "--destination", "out"])
    assert "--images and --labels belong together" in capsys.readouterr().err


def test_labels_of_flat_images_are_whole_names_or_integers(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for n in range(3):
        (tmp_path / "images" / f"my image {n}.jpg").write_bytes(jpeg(n))
    labels = tmp_path / "labels.csv"
    labels.write_text("name,class\n" + "".join(f"my image {n}.jpg,golden {'er'[n % 2]}\n" for n in range(3)))
    source = flat_images(tmp_path / "images", labels)
    assert (source.classes, [source.load(n)[3] for n in range(3)]) == (["golden e", "golden r"], [0, 1, 0])
    labels.write_text("".join(f"my image {n}.jpg\t{10 - n}\n" for n in range(3)))
    source = flat_images(tmp_path / "images", labels)
    assert (source.classes, [source.load(n)[3] for n in range(3)]) == (None, [10, 9, 8])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ILSVRC2012_validation_ground_truth.txt", b"3 1 2 1 9", "meta.mat has no class of the number 9"),
        ("ILSVRC2012_validation_ground_truth.txt", b"3 1 2 1 x", "meta.mat has no class of the number x"),
        ("meta.mat", b"damaged", "meta.mat cannot be read"),
    ],
)
def test_damaged_development_kits_are_one_line(
    imagenet: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with tarfile.open(imagenet / "ILSVRC2012_devkit_t12.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    (tmp_path / "ILSVRC2012_devkit_t12" / "data" / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        flat_images(imagenet / "ILSVRC2012_img_val.tar", tmp_path / "ILSVRC2012_devkit_t12")
    assert "\n" not in str(caught.value)
