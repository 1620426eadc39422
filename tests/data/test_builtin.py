import gzip
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from launching import SECONDS
from scalevit.data.builtin import ensure_builtin
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.shards.index import load_index
from scalevit.errors import SettingError, UserError


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_they_are_scikit_learns(digits):
    from sklearn.datasets import load_digits

    expected = load_digits()
    found = {}
    for part, count in (("train", 1437), ("validation", 360)):
        index = load_index(digits / part)
        assert len(index) == count
        assert len(index.shards) > 1
        # In proportion: the whole has 174 to 183 of each class.
        assert all(abs(n - count / 10) <= count / 90 for n in np.bincount(index.label, minlength=10))
        dataset = ShardDataset(index, lambda image: image)
        for sample in range(count):
            number = int(index.key(sample).removeprefix("digit-"))
            found[number] = np.asarray(dataset._decode(sample)), int(index.label[sample])
    assert sorted(found) == list(range(1797))
    for number, (pixels, label) in found.items():
        assert label == expected.target[number]
        assert pixels.shape == (8, 8, 3)
        np.testing.assert_array_equal(np.rint(pixels[..., 1] * (16 / 255)), expected.images[number])


def test_again_changes_nothing(digits, tmp_path):
    before = contents(digits)
    times = {path: path.stat().st_mtime_ns for path in digits.rglob("*.tar")}
    ensure_builtin("digits", digits / "train", digits / "validation")
    assert contents(digits) == before
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*.tar")} == times
    ensure_builtin("digits", tmp_path / "a" / "t", tmp_path / "b" / "v")
    assert contents(tmp_path / "a" / "t") == contents(digits / "train")
    assert contents(tmp_path / "b" / "v") == contents(digits / "validation")


CALL = """
import sys
from scalevit.data.builtin import ensure_builtin
ensure_builtin("digits", sys.argv[1], sys.argv[2])
"""


def start(folder):
    return subprocess.Popen([sys.executable, "-c", CALL, folder / "train", folder / "validation"])


def test_processes_at_once(digits, tmp_path):
    processes = [start(tmp_path) for _ in range(3)]
    assert [process.wait(SECONDS) for process in processes] == [0, 0, 0]
    assert contents(tmp_path) == contents(digits)


def test_from_any_interruption(digits, tmp_path):
    """Killed once while there are shards under the temporary name."""
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = start(folder)
        deadline = time.monotonic() + SECONDS
        while not list(folder.glob("train*/*.tar")):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = contents(folder)
        if left != contents(digits):
            break  # else it was done before this process had its turn
    assert left
    assert left != contents(digits)
    ensure_builtin("digits", folder / "train", folder / "validation")
    assert contents(folder) == contents(digits)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        ensure_builtin("digits", tmp_path / "train", tmp_path / "validation")
    assert contents(tmp_path) == {"train/thesis.txt": b"mine"}


def write_idx(folder, part, images, labels):
    """Two gzipped files in the form of MNIST's."""
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
        content = bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()
        (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))


@pytest.fixture
def idx_files(tmp_path):
    """12 training and 5 test images, all different."""
    folder = tmp_path / "files"
    folder.mkdir()
    for part, count in (("train", 12), ("t10k", 5)):
        images = np.arange(count * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(count, 28, 28)
        images[:, 0, 0] = np.arange(count)
        write_idx(folder, part, images, np.arange(count, dtype=np.uint8) % 10)
    return folder


@pytest.mark.parametrize(("name", "classes"), [("fashion-mnist", ["T-shirt/top", "trouser"]), ("idx", None)])
def test_sets_in_mnists_form(name, classes, idx_files, tmp_path):
    ensure_builtin(name, tmp_path / "train", tmp_path / "validation", idx_files)
    for part, count in (("train", 12), ("validation", 5)):
        index = load_index(tmp_path / part)
        dataset = ShardDataset(index, lambda image: image)
        found = [(np.asarray(dataset._decode(sample))[0, 0, 0], label) for sample, label in enumerate(index.label)]
        assert sorted(found) == [(number, number % 10) for number in range(count)]
        assert (None if index.classes is None else list(index.classes[:2])) == classes
    assert [pixel for pixel, _ in found] != sorted(pixel for pixel, _ in found), "shuffled"


def test_files_that_are_not_there(idx_files, tmp_path, monkeypatch):
    monkeypatch.setattr("scalevit.data.builtin.FASHION_MNIST", tmp_path / "none")
    places = tmp_path / "train", tmp_path / "validation"
    with pytest.raises(SettingError, match=r"install the package dataset-fashion-mnist .* or name a folder"):
        ensure_builtin("fashion-mnist", *places)
    with pytest.raises(SettingError, match="name a folder with the IDX files of idx"):
        ensure_builtin("idx", *places)
    (idx_files / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SettingError, match=r"one file \*labels-idx1-ubyte\* for train \(found: none\)"):
        ensure_builtin("idx", *places, idx_files)
    assert not any(place.exists() for place in places)
