"""Class names of two sets in a run: compared, mapped, and written with everything that a user takes away."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from launching import QUICKSTART
from scalevit.config.loading import load_config
from scalevit.data.images import encode_png
from scalevit.data.writing.writer import write_samples
from scalevit.errors import UserError
from scalevit.models.build import build_model
from scalevit.models.reductions.none import NoReduction
from scalevit.training.resume import check_classes
from scalevit.training.run import prepare, prepare_evaluation

SETTINGS = ["data.builtin=null", "data.train=train", "data.validation=validation", "data.workers=0"]
SIZES = ["train.global_batch=2", "model.num_classes=3", "model.kwargs.depth=2", "model.kwargs.embed_dim=24"]


def write(folder: Path, classes: list[str] | None, labels: list[int]) -> None:
    image = encode_png(np.zeros((8, 8), np.uint8))
    write_samples([(f"n{n}", "png", image, label) for n, label in enumerate(labels)], folder, classes=classes)


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch, *settings: str):
    monkeypatch.chdir(folder)
    return prepare(load_config(QUICKSTART, [*SETTINGS, *SIZES, *settings]))


def test_a_validation_set_with_fewer_classes_is_mapped_by_name(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "train", ["cat", "dog", "x"], [0, 1, 2])
    write(tmp_path / "validation", ["dog", "x"], [0, 1])
    data = prepared(tmp_path, monkeypatch).data
    assert data.evaluation.dataset.index.label.tolist() == [1, 2]
    assert data.classes == ("cat", "dog", "x")


def test_another_order_is_mapped_and_a_foreign_class_refused(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "train", ["cat", "dog", "x"], [0, 1, 2])
    write(tmp_path / "validation", ["x", "dog", "cat"], [0, 1, 2])
    assert prepared(tmp_path, monkeypatch).data.evaluation.dataset.index.label.tolist() == [2, 1, 0]
    write(tmp_path / "other" / "train", ["cat", "dog", "x"], [0, 1, 2])
    write(tmp_path / "other" / "validation", ["cat", "bird"], [0, 1])
    with pytest.raises(UserError, match=r"shards at validation: class 'bird' of 2 is not among the 3 classes"):
        prepared(tmp_path / "other", monkeypatch)


def test_sets_without_names_are_taken_as_they_are(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "train", None, [0, 1, 2])
    write(tmp_path / "validation", ["dog", "x"], [0, 1])
    data = prepared(tmp_path, monkeypatch).data
    assert data.evaluation.dataset.index.label.tolist() == [0, 1]


def test_names_from_a_file_number_both_sets(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "train", ["cat", "dog", "x"], [0, 1, 2])
    write(tmp_path / "validation", ["dog", "x"], [0, 1])
    (tmp_path / "names.txt").write_text("x\ndog\ncat\n")
    data = prepared(tmp_path, monkeypatch, "data.class_names=names.txt").data
    assert data.evaluation.dataset.index.label.tolist() == [1, 0]
    assert data.train.dataset.index.label.tolist() == [2, 1, 0]
    assert data.classes == ("x", "dog", "cat")


@pytest.mark.parametrize(("names", "expected"), [("cat\ndog\nx\n", ("cat", "dog", "x")), (None, None)])
def test_classes_of_a_stream(tmp_path: Path, monkeypatch, names: str | None, expected: tuple[str, ...] | None) -> None:
    """A stream knows no set.json, and a validation set with fewer classes does not name them."""
    write(tmp_path / "train", ["cat", "dog", "x"], [0, 1, 2])
    write(tmp_path / "validation", ["dog", "x"], [0, 1])
    settings = ["data.train=pipe:cat train/shard-000000.tar", "data.stream_samples_per_epoch=3"]
    settings.append("data.augmentation.aug_repeats=1")
    if names is not None:
        (tmp_path / "names.txt").write_text(names)
        settings.append("data.class_names=names.txt")
    data = prepared(tmp_path, monkeypatch, *settings).data
    assert data.classes == expected
    assert data.evaluation.dataset.index.label.tolist() == ([0, 1] if names is None else [1, 2])


def test_evaluated_weights_without_names_take_those_of_the_training_set(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "train", ["cat", "dog", "x"], [0, 1, 2])
    write(tmp_path / "validation", ["dog", "x"], [0, 1])
    monkeypatch.chdir(tmp_path)
    config = load_config(QUICKSTART, [*SETTINGS, *SIZES, "model.initial_weights=weights.pth"])
    shapes = config.model.without_weights()
    torch.save(build_model(shapes, NoReduction(), seed=0).state_dict(), "weights.pth")
    assert prepare_evaluation(config).data.dataset.index.label.tolist() == [1, 2]
    assert "names no classes" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "train")
    assert prepare_evaluation(config).data.dataset.index.label.tolist() == [0, 1]
    assert "weights.pth names no classes: labels of data.validation are taken as they are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (["a", "b"], ["a", "c"], "label 1 was class 'b' and is 'c' in data.train"),
        (["a", "b"], ["a"], "label 1 was class 'b' and is None"),
        (["a"], ["a", "b"], "label 1 was class None and is 'b'"),
    ],
)
def test_a_resumed_run_must_have_the_same_names(before: list[str], now: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^checkpoint x: {message}"):
        check_classes(before, now, "checkpoint x")
    check_classes(before, before, "checkpoint x")
    check_classes(None, now, "checkpoint x")
