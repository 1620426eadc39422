import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from launching import SECONDS
from scalevit.data.builtin import ensure_digits
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.shards.index import load_index
from scalevit.errors import UserError


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
    ensure_digits(digits / "train", digits / "validation")
    assert contents(digits) == before
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*.tar")} == times
    ensure_digits(tmp_path / "a" / "t", tmp_path / "b" / "v")
    assert contents(tmp_path / "a" / "t") == contents(digits / "train")
    assert contents(tmp_path / "b" / "v") == contents(digits / "validation")


CALL = "import sys; from scalevit.data.builtin import ensure_digits; ensure_digits(sys.argv[1], sys.argv[2])"


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
    ensure_digits(folder / "train", folder / "validation")
    assert contents(folder) == contents(digits)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        ensure_digits(tmp_path / "train", tmp_path / "validation")
    assert contents(tmp_path) == {"train/thesis.txt": b"mine"}
