"""`scalevit shards show`: the table and the sheet."""

import numpy as np
import pytest
from PIL import Image

from scalevit.cli.main import main
from scalevit.data.images import encode_png
from scalevit.data.inspection.contact_sheet import contact_sheet, spread_over_classes
from scalevit.data.inspection.survey import survey
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.shards.index import load_index
from scalevit.data.transforms.base import TrainingAugmentation
from scalevit.data.transforms.device import DeviceTransform
from scalevit.data.transforms.timm_pipeline import TimmTraining, evaluation_transform
from scalevit.data.writing.writer import write_samples

CELL, GAP, LINE = 168, 8, 18
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Four images of two of three classes: one turned by EXIF, one that is none."""
    folder = tmp_path_factory.mktemp("odd")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 20)).save(folder / "turned.jpg", exif=exif)
    images = [
        ("a", "jpg", (folder / "turned.jpg").read_bytes(), 0),
        ("b", "png", encode_png(np.zeros((60, 10), np.uint8)), 0),
        ("c", "png", b"no image", 2),
        ("d", "png", encode_png(np.zeros((10, 10, 3), np.uint8)), 2),
    ]
    write_samples(images, folder / "set", classes=["ant", "bee", "cow"])
    return folder / "set"


def test_survey(odd):
    found = survey(load_index(odd), images=100)
    assert found.sizes.tolist() == [[30, 20], [10, 60], [10, 10]]
    assert dict(found.formats) == {"JPEG RGB": 1, "PNG L": 1, "PNG RGB": 1}
    assert found.turned == 1
    assert found.unreadable == {"c": "unknown image format"}
    assert len(survey(load_index(odd), images=2).sizes) <= 2


def test_table(odd, capsys):
    main(["shards", "show", str(odd)])
    shown = capsys.readouterr().out
    for part in (
        "4 images of 2 classes in 1 shard, ",
        "0 ant 2 50.0%",
        "1 named classes have no images: bee",
        "shortest side 10 10 10 20 20",
        "width / height 0.17",
        "turned by EXIF: 1",
        "bad image: c: unknown image format",
    ):
        assert part in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 100


def test_many_classes_are_cut(tmp_path, capsys):
    write_samples([(f"{n}", "png", b"x", n % 40) for n in range(90)], tmp_path / "set")
    main(["shards", "show", str(tmp_path / "set"), "--images", "1"])
    shown = capsys.readouterr().out
    assert "...    20 more" in shown
    assert "bad image" in shown


def test_samples_of_all_classes(odd):
    index = load_index(odd)
    assert [int(index.label[sample]) for sample in spread_over_classes(index, 2)] == [0, 2]
    assert spread_over_classes(index, 9) == [0, 1, 2, 3]


def test_the_sheet_shows_what_training_sees(odd):
    index = load_index(odd)
    train = ShardDataset(index, TimmTraining(TrainingAugmentation(image_size=CELL, mean=HALF)), seed=3)
    evaluation = ShardDataset(index, evaluation_transform(image_size=CELL, crop_pct=1.0))
    settings = {"copies": 2, "mean": HALF, "std": HALF}
    plain = DeviceTransform(mean=HALF, std=HALF)
    sheet = contact_sheet(train, evaluation, [1, 2], erase=plain, **settings)
    assert sheet.size == (GAP + 4 * (CELL + GAP), GAP + LINE + 2 * (LINE + CELL + GAP))
    pixels = np.asarray(sheet)

    def cell(row: int, column: int) -> np.ndarray:
        top, left = GAP + 2 * LINE + row * (LINE + CELL + GAP), GAP + column * (CELL + GAP)
        return pixels[top : top + CELL, left : left + CELL]

    copies = train.copies(1, 1, [0, 1]).tensors
    for number in (0, 1):
        assert (cell(0, 2 + number) == copies[number].permute(1, 2, 0).numpy()).all()
    assert (cell(0, 1) == evaluation.image(1).permute(1, 2, 0).numpy()).all()
    # A bad image has empty cells, though a run would replace it.
    for column in range(4):
        assert len(np.unique(cell(1, column))) == 1
    erased = contact_sheet(
        train, evaluation, [1, 2], erase=DeviceTransform(mean=HALF, std=HALF, random_erasing=1.0), **settings
    )
    assert (np.asarray(erased) != pixels).any()


def test_sheet_command(odd, tmp_path, capsys):
    path = tmp_path / "sheet.png"
    main(["shards", "show", str(odd), "--sheet", str(path), "--samples", "2", "--copies", "1", "data.transforms=fast"])
    assert f"{path}: 2 samples before and after augmentation" in capsys.readouterr().out
    with Image.open(path) as sheet:
        assert sheet.size == (GAP + 3 * (CELL + GAP), GAP + LINE + 2 * (LINE + CELL + GAP))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sheet", "x.jpg"], "--sheet x.jpg: must be the name of a .png file"),
        (["--sheet", "/no/such/x.png"], "--sheet /no/such/x.png: cannot be written (No such file or directory)"),
        (["data.transforms=fast"], "give --sheet FILE.png as well"),
        (["--sheet", "x.png", "data.transform=fast"], "nearest: data.transforms"),
        (["--images", "0"], "argument --images: 0: must be at least 1"),
    ],
)
def test_bad_arguments(odd, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["shards", "show", str(odd), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
