import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torchvision
import webdataset
from PIL import Image

from launching import SECONDS
from scalevit.data.images import Resize, encode_png
from scalevit.data.shards.index import load_index
from scalevit.data.writing.sources.files import image_folder as image_folder_source
from scalevit.data.writing.sources.memory import MemorySource
from scalevit.data.writing.writer import WriteSettings, _lock_set, write_image_folder, write_samples, write_shards
from scalevit.errors import UserError


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def expected_samples(image_folder):
    """(label, file content) pairs, by torchvision's own reader of such folders."""
    return sorted(
        (label, open(path, "rb").read()) for path, label in torchvision.datasets.ImageFolder(image_folder).samples
    )


def test_webdataset_reads_them(image_folder, shards):
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    images = [next(sample[kind] for kind in ("jpg", "jpeg", "png") if kind in sample) for sample in samples]
    read = sorted((int(sample["cls"]), image) for sample, image in zip(samples, images, strict=True))
    assert read == expected_samples(image_folder)
    assert len({sample["__key__"] for sample in samples}) == 23


def test_tarfile_reads_them(image_folder, shards):
    read = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert {(member.mtime, member.mode, member.uid) for member in members} == {(0, 0o644, 0)}
            content = {member.name: tar.extractfile(member).read() for member in members}
        for name, payload in content.items():
            if not name.endswith(".cls"):
                read.append((int(content[name.partition(".")[0] + ".cls"]), payload))
    assert sorted(read) == expected_samples(image_folder)


def test_each_shard_has_its_description(shards):
    counts = []
    for path in sorted(shards.glob("*.tar")):
        about = json.loads(path.with_suffix(".json").read_text())
        assert about["size"] == path.stat().st_size
        assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert sum(about["classes"].values()) == about["count"]
        counts.append(about["count"])
    assert counts == [10, 10, 3]
    about = json.loads((shards / "set.json").read_text())
    assert about["classes"] == ["ant", "bee", "cow"]
    assert about["samples"] == 23
    assert about["shards"] == [f"shard-{n:06d}.tar" for n in range(3)]


def test_same_bytes_with_workers_and_other_bytes_with_another_seed(image_folder, shards, tmp_path):
    write_image_folder(image_folder, tmp_path / "again", shard_size=10, seed=3, workers=2)
    assert contents(tmp_path / "again") == contents(shards)
    write_image_folder(image_folder, tmp_path / "other", shard_size=10, seed=4)
    assert contents(tmp_path / "other") != contents(shards)


def test_classes_are_spread_over_the_shards(shards):
    for path in sorted(shards.glob("shard-*.json"))[:2]:
        assert len(json.loads(path.read_text())["classes"]) == 3


def test_shrinking(image_folder, tmp_path):
    """The images are 50 x 40: 30 shrinks them, 40 leaves their bytes alone."""
    write_image_folder(image_folder, tmp_path / "small", resize=Resize(30, "shortest", 80))
    with tarfile.open(tmp_path / "small" / "shard-000000.tar") as tar:
        for member in tar.getmembers():
            if not member.name.endswith(".cls"):
                assert member.name.endswith(".jpg")
                with Image.open(io.BytesIO(tar.extractfile(member).read())) as image:
                    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (38, 30))
    write_image_folder(image_folder, tmp_path / "same", resize=Resize(40))
    write_image_folder(image_folder, tmp_path / "plain")
    name = "shard-000000.tar"
    assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    write_image_folder(image_folder, tmp_path / "long", resize=Resize(30, "longest"))
    with tarfile.open(tmp_path / "long" / "shard-000000.tar") as tar:
        payload = tar.extractfile(tar.getmembers()[0]).read()
    with Image.open(io.BytesIO(payload)) as image:
        assert image.size == (30, 24)


NUMBERED = [(f"n{number}", "png", b"%d" % number, number) for number in range(12)]


class Breaks(MemorySource):
    """Fails at one sample; the same as a whole source otherwise."""

    at = 7

    def load(self, number):
        if number == self.at:
            raise KeyboardInterrupt
        return super().load(number)


def test_a_set_has_its_name_only_when_complete_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    settings = WriteSettings(shard_size=3, seed=None, check="none")
    with pytest.raises(KeyboardInterrupt):
        write_shards(Breaks(NUMBERED), tmp_path / "set", settings)
    partial = tmp_path / "set.partial"
    assert not (tmp_path / "set").exists()
    assert sorted(path.name for path in partial.glob("*.json")) == [
        "settings.json", "shard-000000.json", "shard-000001.json",
    ]  # fmt: skip
    times = [(partial / f"shard-00000{n}.tar").stat().st_mtime_ns for n in range(2)]
    # A shard whose description is missing or whose size is wrong is written again.
    (partial / "shard-000001.json").unlink()
    write_shards(MemorySource(NUMBERED), tmp_path / "set", settings)
    again = [(tmp_path / "set" / f"shard-00000{n}.tar").stat().st_mtime_ns for n in range(2)]
    assert again[0] == times[0]
    assert again[1] > times[1]
    assert not partial.exists()
    write_shards(MemorySource(NUMBERED), tmp_path / "whole", settings)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_what_was_begun_otherwise_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(Breaks(NUMBERED), tmp_path / "set", WriteSettings(3, seed=None, check="none"))
    with pytest.raises(
        UserError, match=r"were started with other settings \(shard_size: 3 then, 4 now\): remove that folder"
    ):
        write_shards(MemorySource(NUMBERED), tmp_path / "set", WriteSettings(4, seed=None, check="none"))
    with pytest.raises(
        UserError, match=r"were started with other settings \(source: .* then, .* now; samples: 12 then, 11 now\)"
    ):
        write_shards(MemorySource(NUMBERED[:11]), tmp_path / "set", WriteSettings(3, seed=None, check="none"))


WRITER = """
import sys
from scalevit.data.writing.writer import WriteSettings, write_shards
from scalevit.data.writing.sources.files import image_folder
write_shards(image_folder(sys.argv[1]), sys.argv[2], WriteSettings(shard_size=2, seed=3), workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_time_and_started_again_it_loses_and_repeats_nothing(image_folder, tmp_path, workers):
    source = tmp_path / "images"
    for copy in range(6):
        for path in image_folder.rglob("*.*"):
            (source / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / path.parent.name / f"{copy}-{path.name}")
    write_shards(image_folder_source(source), tmp_path / "whole", WriteSettings(shard_size=2, seed=3))
    shards = len(list((tmp_path / "whole").glob("*.tar")))
    assert shards == 69
    arguments = [sys.executable, "-c", WRITER, source, tmp_path / "set", str(workers)]
    kills = 0
    for wanted in (1, 20, 40, 60):
        writer = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while writer.poll() is None and len(list((tmp_path / "set.partial").glob("*.tar"))) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        writer.kill()
        kills += writer.wait(10) == -signal.SIGKILL
        time.sleep(0.3)  # for workers to notice, so that the lock is free
    assert kills >= 2
    last = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert last.returncode == 0, last.stderr
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_two_writers_of_one_set(tmp_path):
    (tmp_path / "set.partial").mkdir()
    with _lock_set(tmp_path / "set.partial"), pytest.raises(UserError, match="another process is writing them"):
        write_samples(NUMBERED, tmp_path / "set")


def test_some_bad_images_may_be_left_out(image_folder, tmp_path):
    source = tmp_path / "images"
    shutil.copytree(image_folder, source)
    (source / "ant" / "bad.png").write_text("hello")
    (source / "cow" / "bad.png").write_text("hello")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^max_faults = 1: found 2 bad images"):
            write_image_folder(source, tmp_path / f"out{workers}", shard_size=10, max_faults=1, workers=workers)
        write_image_folder(source, tmp_path / f"out{workers}", shard_size=10, max_faults=2, workers=workers)
        about = json.loads((tmp_path / f"out{workers}" / "set.json").read_text())
        assert about["samples"] == len(load_index(tmp_path / f"out{workers}")) == 23
        reasons = sorted(fault["reason"] for fault in about["faults"])
        assert len(reasons) == 2
        assert "ant/bad.png: cannot be decoded" in reasons[0]


def test_a_destination_with_files_is_refused(image_folder, shards):
    before = contents(shards)
    with pytest.raises(UserError, match=r"shards at .*: not an empty folder; .*another destination"):
        write_image_folder(image_folder, shards)
    assert contents(shards) == before


def test_a_shard_of_bad_images_only_is_left_out(tmp_path):
    good = encode_png(np.zeros((4, 4), np.uint8))
    samples = [("a", "png", good, 0), ("b", "png", good, 1), ("c", "png", b"bad", 1)]
    write_shards(MemorySource(samples), tmp_path / "set", WriteSettings(2, seed=None, max_faults=1))
    assert sorted(path.name for path in (tmp_path / "set").glob("shard-*")) == ["shard-000000.json", "shard-000000.tar"]
    about = json.loads((tmp_path / "set" / "set.json").read_text())
    assert (about["shards"], about["samples"], len(about["faults"])) == (["shard-000000.tar"], 2, 1)
    assert len(load_index(tmp_path / "set")) == 2
