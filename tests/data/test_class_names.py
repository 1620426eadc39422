"""Names of classes: from a set's `set.json`, and the labels of one set numbered like those of another."""

import json
from pathlib import Path

import numpy as np
import pytest

from scalevit.data.images import encode_png
from scalevit.data.shards.index import Index, load_index
from scalevit.data.shards.labels import LabelFormat
from scalevit.data.writing.sources.classes import read_class_map
from scalevit.data.writing.writer import write_samples
from scalevit.errors import UserError

IMAGE = encode_png(np.zeros((8, 8), np.uint8))


def write(folder: Path, classes: list[str] | None, labels: list[int]) -> Index:
    samples = [(f"n{number}", "png", IMAGE, label) for number, label in enumerate(labels)]
    write_samples(samples, folder, shard_size=2, classes=classes)
    return load_index(folder)


def test_a_set_names_its_classes(tmp_path: Path) -> None:
    assert write(tmp_path / "set", ["cat", "dog"], [0, 1, 0]).classes == ("cat", "dog")
    assert load_index(tmp_path / "set").classes == ("cat", "dog"), "from the saved index as well"
    assert load_index(tmp_path / "set" / "shard-00000{0..1}.tar").classes == ("cat", "dog")
    assert write(tmp_path / "unnamed", None, [0, 1]).classes is None
    (tmp_path / "set" / "set.json").unlink()
    assert load_index(tmp_path / "set").classes is None


@pytest.mark.parametrize("names", ["cat", ["cat", "cat"], [1, 2], {"cat": 0}])
def test_damaged_names_are_one_line(tmp_path: Path, names: object) -> None:
    write(tmp_path / "set", ["cat", "dog"], [0, 1])
    path = tmp_path / "set" / "set.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": names}))
    with pytest.raises(UserError, match=r"set\.json: is damaged"):
        load_index(tmp_path / "set")


def test_labels_follow_the_names_of_another_set(tmp_path: Path) -> None:
    index = write(tmp_path / "set", ["dog", "x"], [0, 1, 1, 0])
    numbered = index.numbered_as(["cat", "dog", "x"])
    assert numbered.label.tolist() == [1, 2, 2, 1]
    assert numbered.classes == ("cat", "dog", "x")
    assert index.label.tolist() == [0, 1, 1, 0]
    same = index.numbered_as(["dog", "x"])
    assert same is index


def test_a_class_that_the_other_set_lacks_is_an_error(tmp_path: Path) -> None:
    index = write(tmp_path / "set", ["cat", "dogs", "bird"], [0, 1, 0])
    with pytest.raises(UserError, match=r"class 'dogs' of 3 is not among the 2 classes .*; nearest: dog$"):
        index.numbered_as(["cat", "dog"])
    # A class without an image is no mistake.
    assert index.numbered_as(["x", "cat", "dogs"]).label.tolist() == [1, 2, 1]


def test_without_names_labels_stay(tmp_path: Path) -> None:
    index = write(tmp_path / "set", None, [0, 2])
    assert index.numbered_as(["cat", "dog"]) is index


def test_given_names_number_a_set_that_has_its_own(tmp_path: Path) -> None:
    write(tmp_path / "set", ["dog", "x"], [0, 1, 1])
    for names, labels in ((("cat", "dog", "x"), [1, 2, 2]), (("x", "dog"), [1, 0, 0])):
        index = load_index(tmp_path / "set", labels=LabelFormat(names=names))
        assert (index.label.tolist(), index.classes) == (labels, names)
    with pytest.raises(UserError, match=r"class 'x' of 2 is not among the 2 classes of the file of class names"):
        load_index(tmp_path / "set", labels=LabelFormat(names=("cat", "dog")))


def test_shards_of_folders_with_other_classes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", ["cat", "dog"], [0, 1, 0])
    write(tmp_path / "b", ["cat", "dog"], [1])
    both = load_index(tmp_path / "{a,b}" / "*.tar")
    assert (both.classes, len(both)) == (("cat", "dog"), 4)
    write(tmp_path / "c", None, [0])
    assert load_index(tmp_path / "{a,c}" / "*.tar").classes is None
    write(tmp_path / "d", ["dog", "x"], [0])
    for folders in ("a,d", "c,a,d"):
        with pytest.raises(UserError, match=r"shards at .*a and .*d: their classes differ"):
            load_index(tmp_path / f"{{{folders}}}" / "*.tar")


def class_map(folder: Path, content: object) -> Path:
    path = folder / "map.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_class_map_gives_new_labels_by_name_or_label(tmp_path: Path) -> None:
    """As timm's: several classes may be one. Names remain where each label has one class."""
    named = write(tmp_path / "named", ["cat", "dog", "bird"], [0, 1, 2, 1])
    labels = read_class_map(class_map(tmp_path, {"dog": 0, "cat": 1, "bird": 2}))
    mapped = named.relabelled(labels, "map")
    assert mapped.label.tolist() == [1, 0, 2, 0]
    assert mapped.classes == ("dog", "cat", "bird")
    assert mapped.fingerprint != named.fingerprint, "a run cannot be resumed with other labels"
    pets = named.relabelled({"cat": 1, "dog": 1, "2": 0}, "map")
    assert pets.label.tolist() == [1, 1, 0, 1]
    assert pets.classes is None
    plain = write(tmp_path / "plain", None, [5, 3, 5])
    assert plain.relabelled({"3": 0, "5": 7}, "map").label.tolist() == [7, 0, 7]


def test_a_class_that_the_map_lacks_is_an_error(tmp_path: Path) -> None:
    index = write(tmp_path / "set", ["cat", "dogs", "bird"], [0, 1, 2])
    with pytest.raises(UserError, match=r"^map: has no label for 'dogs' and 1 more; nearest: dog$"):
        index.relabelled({"cat": 1, "dog": 0}, "map")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\ndog\n", r"is not an object in JSON \(a list of names is a file of class names\)$"),
        ({"cat": "1"}, r"the label of 'cat' must be an integer from 0, not \"1\"$"),
        ({}, "is not an object"),
    ],
    ids=["text", "no integer", "empty"],
)
def test_a_wrong_class_map_is_one_line(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UserError, match=rf"^class map .*map\.json: {message}"):
        read_class_map(class_map(tmp_path, content))
