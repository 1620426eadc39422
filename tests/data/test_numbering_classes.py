"""From class names to labels: sorted, listed in a file, or renamed by a map."""

from pathlib import Path

import pytest

from scalevit.data.writing.sources.classes import ClassSettings, read_class_names, read_label_map
from scalevit.errors import UserError


def test_names_are_sorted_listed_or_renamed() -> None:
    found = ["n2", "n10", "n2"]
    assert ClassSettings().numbered(found) == (["n10", "n2"], {"n10": 0, "n2": 1})
    assert ClassSettings("natural").numbered(found) == (["n2", "n10"], {"n2": 0, "n10": 1})
    listed = ClassSettings(names=["x", "n2", "n10"])
    assert listed.numbered(found) == (["x", "n2", "n10"], {"n2": 1, "n10": 2})
    merged = ClassSettings(renamed={"n2": "cat", "n10": "cat", "n3": "dog"})
    assert merged.numbered(found) == (["cat"], {"n2": 0, "n10": 0})
    both = ClassSettings(names=["dog", "cat"], renamed={"n2": "cat", "n10": "dog"})
    assert both.numbered(found) == (["dog", "cat"], {"n2": 1, "n10": 0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ClassSettings(names=["cats", "dog"]), "class 'cat' is not in the file of class names; nearest: cats"),
        (ClassSettings(renamed={"caat": "x"}), "class 'cat' is not in the label map; nearest: caat"),
    ],
)
def test_a_name_without_a_class_is_an_error(settings: ClassSettings, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        settings.numbered(["cat"])


@pytest.mark.parametrize("content", ["cat\ndog\r\n\n", '["cat", "dog"]', "\ufeffcat\ndog"])
def test_a_file_of_class_names(tmp_path: Path, content: str) -> None:
    (tmp_path / "names").write_text(content, encoding="utf-8")
    assert read_class_names(tmp_path / "names") == ["cat", "dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("a\n\nb\n", "label 1 is ''"),
        ("a\na\n", "label 1 is 'a'"),
        ("[1]", "label 0 is 1"),
        ("[", "is not a list in JSON"),
        (None, "cannot be read"),
    ],
)
def test_bad_files_of_class_names(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "names").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_class_names(tmp_path / "names")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "n01 tench, Tinca tinca\nn02 goldfish\n",
        'n01,"tench, Tinca tinca"\nn02,goldfish\n',
        "n01\ttench, Tinca tinca\n\nn02\tgoldfish",
        '{"n01": "tench, Tinca tinca", "n02": "goldfish"}',
    ],
)
def test_a_label_map(tmp_path: Path, content: str) -> None:
    (tmp_path / "map").write_text(content)
    assert read_label_map(tmp_path / "map") == {"n01": "tench, Tinca tinca", "n02": "goldfish"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n01\n", "line 1: must be two columns"),
        ("n01 a\nn01 b\n", "'n01' is both 'a' and 'b'"),
        ("{", "is not an object in JSON"),
        (None, "cannot be read"),
    ],
)
def test_bad_label_maps(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "map").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_label_map(tmp_path / "map")
    assert "\n" not in str(caught.value)


def test_renamed_classes_are_in_the_order_of_the_sources_names() -> None:
    """So that WordNet's names keep ImageNet's numbers when words replace them."""
    settings = ClassSettings(renamed={"n01": "tench", "n02": "crane", "n03": "goldfish", "n04": "crane"})
    classes, labels = settings.numbered(["n04", "n03", "n01", "n02"])
    assert classes == ["tench", "crane", "goldfish"]
    assert labels == {"n01": 0, "n02": 1, "n03": 2, "n04": 1}


def test_labels_as_integers_or_names() -> None:
    assert ClassSettings().labelled(["3", "-1", "3"]) == (None, [3, -1, 3])
    assert ClassSettings(names=["a", "b"]).labelled(["1", "0"]) == (["a", "b"], [1, 0])
    assert ClassSettings(names=["1", "0"]).labelled(["1", "0"]) == (["1", "0"], [0, 1])
    assert ClassSettings().labelled(["1", "x", "y"]) == (["1", "x", "y"], [0, 1, 2])
    with pytest.raises(UserError, match=r"labels are integers, but not 'unknown' \(1 of 3\)"):
        ClassSettings().labelled(["3", "unknown", "1"])
    with pytest.raises(UserError, match=r"label 2 has no name: the file of class names has 2 lines"):
        ClassSettings(names=["a", "b"]).labelled(["1", "2"])
