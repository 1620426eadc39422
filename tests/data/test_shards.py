import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torchvision
import webdataset
from PIL import Image

from launching import SECONDS
from scalevit.cli.shards import add_arguments, run
from scalevit.data.images import Resize
from scalevit.data.shards.index import load_index
from scalevit.data.writing.sources import DatasetsSource, MemorySource, ShardSource, csv_file
from scalevit.data.writing.sources import image_folder as image_folder_source
from scalevit.data.writing.writer import WriteSettings, _locked, write_image_folder, write_samples, write_shards
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
    settings = WriteSettings(shard_size=3, seed=None)
    with pytest.raises(KeyboardInterrupt):
        write_shards(Breaks(NUMBERED), tmp_path / "set", settings, check=False)
    partial = tmp_path / "set.partial"
    assert not (tmp_path / "set").exists()
    assert sorted(path.name for path in partial.glob("*.json")) == [
        "settings.json", "shard-000000.json", "shard-000001.json",
    ]  # fmt: skip
    times = [(partial / f"shard-00000{n}.tar").stat().st_mtime_ns for n in range(2)]
    # A shard whose description is missing or whose size is wrong is written again.
    (partial / "shard-000001.json").unlink()
    write_shards(MemorySource(NUMBERED), tmp_path / "set", settings, check=False)
    again = [(tmp_path / "set" / f"shard-00000{n}.tar").stat().st_mtime_ns for n in range(2)]
    assert again[0] == times[0]
    assert again[1] > times[1]
    assert not partial.exists()
    write_shards(MemorySource(NUMBERED), tmp_path / "whole", settings, check=False)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_what_was_begun_otherwise_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(Breaks(NUMBERED), tmp_path / "set", WriteSettings(3, seed=None), check=False)
    with pytest.raises(UserError, match=r"were begun otherwise \(shard_size: 3 then, 4 now\): remove that folder"):
        write_shards(MemorySource(NUMBERED), tmp_path / "set", WriteSettings(4, seed=None), check=False)
    with pytest.raises(UserError, match=r"were begun otherwise \(source: .* then, .* now; samples: 12 then, 11 now\)"):
        write_shards(MemorySource(NUMBERED[:11]), tmp_path / "set", WriteSettings(3, seed=None), check=False)


WRITER = """
import sys
from scalevit.data.writing.writer import WriteSettings, write_shards
from scalevit.data.writing.sources import image_folder
write_shards(image_folder(sys.argv[1]), sys.argv[2], WriteSettings(shard_size=2, seed=3), workers=int(sys.argv[3]))
"""


def wait_until_unlocked(folder):
    """For workers that outlive a killed writer to notice it: they hold its lock until then."""
    deadline = time.monotonic() + SECONDS
    while folder.is_dir():
        try:
            with _locked(folder):
                return
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


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
        deadline = time.monotonic() + SECONDS
        while writer.poll() is None and len(list((tmp_path / "set.partial").glob("*.tar"))) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        writer.kill()
        kills += writer.wait(SECONDS) == -signal.SIGKILL
        wait_until_unlocked(tmp_path / "set.partial")
    assert kills >= 2
    last = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert last.returncode == 0, last.stderr
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_two_writers_of_one_set(tmp_path):
    (tmp_path / "set.partial").mkdir()
    with _locked(tmp_path / "set.partial"), pytest.raises(UserError, match="another process is writing them"):
        write_samples(NUMBERED, tmp_path / "set")


def test_csv_file(image_folder, tmp_path):
    paths = sorted(image_folder.rglob("*.*"))[:4]
    rows = [f"{os.path.relpath(path, tmp_path)},{label}" for path, label in zip(paths, "zaza", strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    source = csv_file(tmp_path / "list.csv")
    assert source.classes == ["a", "z"]
    assert [source.load(n)[2:] for n in range(4)] == [
        (path.read_bytes(), label) for path, label in zip(paths, [1, 0, 1, 0], strict=True)
    ]
    (tmp_path / "list.csv").write_text("\n".join(["note,label,path", f"x,-3,{paths[0]}", f"y,40,{paths[1]}"]))
    source = csv_file(tmp_path / "list.csv")
    assert ([source.load(n)[3] for n in range(2)], source.classes) == ([-3, 40], None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.png,1\n", "the first line must name the columns path and label"),
        ("path,label\n", "names no images"),
        ("path,label\na.png,\n", "line 2: no label"),
        ("path,label\na.gif,1\n", "line 2: a.gif is none of .jpg"),
        (None, "cannot be read"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    if content is not None:
        (tmp_path / "list.csv").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        csv_file(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)


def test_shards_of_others_written_anew(shards, tmp_path):
    """A set of three shards to one of six, through webdataset's own writer and with JSON labels."""
    samples = list(webdataset.WebDataset([str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=False))
    (tmp_path / "foreign").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "foreign" / "%03d.tar"), maxcount=9, verbose=0) as writer:
        for sample in samples:
            kind = next(kind for kind in ("jpg", "jpeg", "png") if kind in sample)
            writer.write(
                {"__key__": f"x/{sample['__key__']}", kind: sample[kind], "json": {"class": int(sample["cls"])}}
            )
    write_shards(ShardSource(str(tmp_path / "foreign"), "class"), tmp_path / "new", WriteSettings(4), workers=1)
    old, new = load_index(shards), load_index(tmp_path / "new")
    assert len(new.shards) == 6
    assert sorted(zip(new.crc32, new.label, strict=True)) == sorted(zip(old.crc32, old.label, strict=True))


def test_shards_with_bad_samples_are_not_written_anew(tmp_path):
    write_samples(NUMBERED[:3], tmp_path / "set")
    path = tmp_path / "set" / "shard-000000.tar"
    with tarfile.open(path) as tar:
        second = tar.getmembers()[2].offset_data
    content = bytearray(path.read_bytes())
    content[second] ^= 1
    path.write_bytes(content)
    source = ShardSource(str(tmp_path / "set"), "label")
    source.load(0)
    with pytest.raises(UserError, match=r"key 'n1', offset .*wrong checksum"):
        source.load(1)


def test_datasets_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets; pip install datasets"):
        DatasetsSource(str(tmp_path))


def test_datasets_on_disk(image_folder, tmp_path):
    import datasets  # takes seconds

    paths = sorted(path for path in image_folder.rglob("*.*") if path.parent.name != "cow")
    content = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [int(path.parent.name == "bee") for path in paths],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    # Some versions of datasets and pyarrow cannot hash a table, so it is given a fingerprint.
    table = datasets.table.InMemoryTable.from_pydict(content, schema=features.arrow_schema)
    split = datasets.Dataset(table, fingerprint="0" * 16)
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "hf")
    with pytest.raises(UserError, match="name one of its splits, train, as --split"):
        DatasetsSource(str(tmp_path / "hf"))
    with pytest.raises(UserError, match="no column 'target' among image, label"):
        DatasetsSource(str(tmp_path / "hf"), "train", label="target")
    source = DatasetsSource(str(tmp_path / "hf"), "train")
    assert source.classes == ["ant", "bee"]
    assert sorted(source.load(n)[2:] for n in range(len(source))) == sorted(zip(*reversed(
        (content["label"], [image["bytes"] for image in content["image"]])), strict=True))  # fmt: skip
    write_shards(source, tmp_path / "set", WriteSettings(4), workers=1)
    assert len(load_index(tmp_path / "set")) == 15


def test_some_bad_images_may_be_left_out(image_folder, tmp_path):
    source = tmp_path / "images"
    shutil.copytree(image_folder, source)
    (source / "ant" / "bad.png").write_text("hello")
    (source / "cow" / "bad.png").write_text("hello")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"2 bad images, more than --max-faults = 1"):
            write_image_folder(source, tmp_path / f"out{workers}", shard_size=10, max_faults=1, workers=workers)
        write_image_folder(source, tmp_path / f"out{workers}", shard_size=10, max_faults=2, workers=workers)
        about = json.loads((tmp_path / f"out{workers}" / "set.json").read_text())
        assert about["samples"] == len(load_index(tmp_path / f"out{workers}")) == 23
        reasons = sorted(fault["reason"] for fault in about["faults"])
        assert len(reasons) == 2
        assert "ant/bad.png: cannot be decoded" in reasons[0]


def make_bad_source(kind, folder):
    if kind == "missing":
        return
    folder.mkdir()
    if kind == "empty":
        return
    (folder / "ant").mkdir()
    if kind == "empty class":
        return
    Image.new("RGB", (4, 4)).save(folder / "ant" / "1.jpg")
    if kind == "other file":
        (folder / "ant" / "notes.txt").write_text("hello")
    if kind == "not an image":
        (folder / "ant" / "2.png").write_text("hello")


@pytest.mark.parametrize(("workers", "shortest_side"), [(0, None), (0, 2), (1, None)])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "images at .*source: no such folder"),
        ("empty", "images at .*source: no subfolders"),
        ("empty class", "images at .*ant: none of .jpg"),
        ("other file", "images at .*source: 1 files are not .jpg.*notes.txt"),
        ("not an image", r"image .*2\.png: cannot be decoded \(no known image format\)"),
    ],
)
def test_bad_sources(tmp_path, kind, message, workers, shortest_side):
    make_bad_source(kind, tmp_path / "source")
    resize = Resize(shortest_side) if shortest_side else None
    with pytest.raises(UserError, match=message) as caught:
        write_image_folder(tmp_path / "source", tmp_path / "out", workers=workers, resize=resize)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_destination_with_files_is_refused(image_folder, shards):
    before = contents(shards)
    with pytest.raises(UserError, match=r"shards at .*: not an empty folder; .*another destination"):
        write_image_folder(image_folder, shards)
    assert contents(shards) == before


def test_command(image_folder, tmp_path):
    """As a program that no `__name__` guard protects, with plain lines where there is no terminal."""
    program = """
import argparse, sys
from scalevit.cli import shards as commands
parser = argparse.ArgumentParser()
commands.add_arguments(parser)
commands.run(parser.parse_args(sys.argv[1:]))
"""
    script = tmp_path / "script.py"
    script.write_text(program)
    arguments = ["write", "--source", image_folder, "--destination", tmp_path / "out", "--workers", "1", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("writing out: 23 samples in ")
    assert len(contents(tmp_path / "out")) == 3


def test_importing_the_command_is_cheap():
    program = (
        "import sys; from scalevit.data import commands; print([m for m in ('torch', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("option", ["--shard-size=0", "--workers=-1", "--shortest-side=0", "--quality=101"])
def test_command_refuses(option):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    name, _, value = option.partition("=")
    with pytest.raises(UserError, match=f"{name} = {value}: must be at "):
        run(parser.parse_args(["write", "--source", "a", "--destination", "b", option]))
