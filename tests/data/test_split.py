"""`scalevit shards split`."""

import json

import numpy as np
import pytest
import webdataset

from commands import refused
from scalevit.cli.main import main
from scalevit.data.shards.index import load_index
from scalevit.data.writing.sources.subset import stratified
from scalevit.data.writing.writer import write_samples

LABELS = np.repeat([3, 0, 7, 5], [100, 10, 2, 1])


def test_the_same_share_of_each_class():
    chosen = stratified(LABELS, np.arange(len(LABELS)), share=0.1, seed=0)
    assert {label: int(chosen[label == LABELS].sum()) for label in (3, 0, 7, 5)} == {3: 10, 0: 1, 7: 1, 5: 0}
    other = stratified(LABELS, np.arange(len(LABELS)), share=0.1, seed=1)
    assert (chosen != other).any()
    assert (chosen == stratified(LABELS, np.arange(len(LABELS)), share=0.1, seed=0)).all()
    most = stratified(LABELS, np.arange(len(LABELS)), share=0.99, seed=0)
    assert {label: int((~most[label == LABELS]).sum()) for label in (3, 0, 7)} == {3: 1, 0: 1, 7: 1}


def test_equal_images_stay_together():
    contents = np.arange(len(LABELS)) // 4  # four copies of each; some groups reach into the next class
    for seed in range(20):
        chosen = stratified(LABELS, contents, share=0.25, seed=seed)
        for content in np.unique(contents):
            assert len(set(chosen[contents == content])) == 1
        assert chosen[LABELS == 3].sum() == 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("split") / "whole"
    samples = [(f"{n:03d}", "png", b"image %d" % (n // 2), n % 3) for n in range(60)]
    samples.append(("060", "png", b"alone", 3))
    write_samples(samples, path, shard_size=16, classes=["a", "b", "c", "alone"])
    return path


def test_split_command(whole, tmp_path, capsys):
    arguments = ["shards", "split", str(whole), "--destination", str(tmp_path), "--validation", "0.2", "--workers", "0"]
    main(arguments)
    shown = capsys.readouterr().out
    train, validation = load_index(tmp_path / "train"), load_index(tmp_path / "validation")
    assert f"{len(train)} images for training, {len(validation)} for validation, of 4 classes" in shown
    assert "1 classes have no two different images, and none for validation: alone" in shown
    assert (len(train) + len(validation), train.classes) == (61, validation.classes)
    assert train.classes == ("a", "b", "c", "alone")
    assert set(train.crc32).isdisjoint(validation.crc32)
    whole_index = load_index(whole)
    both = sorted([*zip(train.crc32, train.label, strict=True), *zip(validation.crc32, validation.label, strict=True)])
    assert both == sorted(zip(whole_index.crc32, whole_index.label, strict=True))
    assert json.loads((tmp_path / "validation" / "set.json").read_text())["samples"] == len(validation)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["0", "1", "x", "nan"])
def test_bad_share(whole, tmp_path, capsys, share):
    arguments = ["shards", "split", whole, "--destination", tmp_path]
    assert "argument --validation" in refused(capsys, *arguments, "--validation", share)


def test_nothing_to_split(tmp_path, capsys):
    write_samples([("0", "png", b"x", 0), ("1", "png", b"x", 0)], tmp_path / "whole")
    capsys.readouterr()
    arguments = ["shards", "split", tmp_path / "whole", "--destination", tmp_path / "new"]
    assert "no class has two different images" in refused(capsys, *arguments)
    assert not (tmp_path / "new").exists()


def test_labels_without_a_name_are_numbers(tmp_path, capsys):
    samples = [("a", "png", b"a", 0), ("b", "png", b"b", 0), ("c", "png", b"c", 5), ("d", "png", b"d", -1)]
    write_samples(samples, tmp_path / "whole", classes=["cat"])
    main(["shards", "split", str(tmp_path / "whole"), "--destination", str(tmp_path / "new"), "--workers", "0"])
    assert (
        "2 classes have no two different images, and none for validation: label -1, label 5" in capsys.readouterr().out
    )


def test_samples_that_cannot_be_used_are_left_out_within_a_limit(tmp_path, capsys):
    (tmp_path / "whole").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "whole" / "%03d.tar"), verbose=0) as writer:
        for number, label in enumerate((b"0", b"0", b"cat", b"1", b"1")):
            writer.write({"__key__": str(number), "png": b"%d" % number, "cls": label})
    arguments = ["shards", "split", str(tmp_path / "whole"), "--destination", str(tmp_path / "new"), "--workers", "0"]
    assert "(1 such samples): fix or remove them, or allow them by --max-faults" in refused(capsys, *arguments)
    main([*arguments, "--max-faults", "1"])
    assert "2 images for training, 2 for validation, of 2 classes" in capsys.readouterr().out
