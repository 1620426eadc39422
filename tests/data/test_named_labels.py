"""Shards of other tools whose labels are names, in the layouts of webdataset, img2dataset and timm."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from scalevit.cli.main import main
from scalevit.data.images import encode_png
from scalevit.data.shards.index import load_index
from scalevit.data.shards.labels import LabelFormat, NoLabel

NAMES = ("cat", "dog")
LABELS = [1, 0, 1]
IMAGE = encode_png(np.zeros((8, 8), np.uint8))
LAYOUTS = {
    "webdataset": lambda name: {"cls": name.encode()},
    "img2dataset": lambda name: {"txt": b"a picture of something", "json": {"label": name, "width": 8}},
    "timm": lambda name: {"txt": name.encode()},
}


@pytest.fixture(params=LAYOUTS)
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=2, verbose=0) as writer:
        for number, label in enumerate(LABELS):
            writer.write({"__key__": f"{number:05d}", "png": IMAGE, **LAYOUTS[request.param](NAMES[label])})
    return folder


def test_names_become_labels(shards: Path) -> None:
    index = load_index(shards, labels=LabelFormat(names=NAMES))
    assert index.label.tolist() == LABELS
    assert index.classes == NAMES
    assert not index.faults
    other = load_index(shards, labels=LabelFormat(names=NAMES[::-1]))
    assert other.label.tolist() == [1 - label for label in LABELS], "the saved index is not taken for other names"


def test_without_names_they_are_bad_samples(shards: Path) -> None:
    with pytest.raises(Exception, match=r"none of 3 samples can be used"):
        load_index(shards)


def test_a_name_that_is_not_listed_is_a_bad_sample(shards: Path) -> None:
    index = load_index(shards, labels=LabelFormat(names=("dog", "bird")))
    assert index.label.tolist() == [0, 0]
    assert "the label 'cat' of ." in index.faults[0].reason
    assert index.faults[0].reason.endswith("is neither a class name nor an integer")


def test_integers_stay_and_names_come_first() -> None:
    form = LabelFormat(names=("2", "dog"))
    labels = [form.find({"cls": text.encode}) for text in ("dog", "2", "7")]
    assert labels == [1, 0, 7]
    assert form.find({"json": json.dumps({"label": 5}).encode}) == 5
    with pytest.raises(NoLabel, match="is not an integer"):
        form.find({"json": json.dumps({"label": 1.5}).encode})


def test_rewritten_shards_have_numbers_and_names(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    arguments = ["--shards", str(shards), "--class-names", str(tmp_path / "names.txt"), "--workers", "0"]
    main(["shards", "write", *arguments, "--destination", str(tmp_path / "new")])
    new = load_index(tmp_path / "new")
    assert sorted(new.label.tolist()) == sorted(LABELS)
    assert new.classes == NAMES
