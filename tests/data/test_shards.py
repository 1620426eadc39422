import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile

import pytest
import torchvision
import webdataset
from PIL import Image

from scalevit.data.commands import add_arguments, run
from scalevit.data.shards import write_image_folder, write_samples
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
    assert json.loads((shards / "classes.json").read_text()) == {"classes": ["ant", "bee", "cow"]}


def test_same_bytes_with_workers_and_other_bytes_with_another_seed(image_folder, shards, tmp_path):
    write_image_folder(image_folder, tmp_path / "again", shard_size=10, seed=3, workers=2)
    assert contents(tmp_path / "again") == contents(shards)
    write_image_folder(image_folder, tmp_path / "other", shard_size=10, seed=4)
    assert contents(tmp_path / "other") != contents(shards)


def test_classes_are_spread_over_the_shards(shards):
    for path in sorted(shards.glob("*.json"))[1:3]:
        assert len(json.loads(path.read_text())["classes"]) == 3


def test_shrinking(image_folder, tmp_path):
    """The images are 50 x 40: 30 shrinks them, 40 leaves their bytes alone."""
    write_image_folder(image_folder, tmp_path / "small", shortest_side=30, quality=80)
    with tarfile.open(tmp_path / "small" / "shard-000000.tar") as tar:
        for member in tar.getmembers():
            if not member.name.endswith(".cls"):
                assert member.name.endswith(".jpg")
                with Image.open(io.BytesIO(tar.extractfile(member).read())) as image:
                    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (38, 30))
    write_image_folder(image_folder, tmp_path / "same", shortest_side=40)
    write_image_folder(image_folder, tmp_path / "plain")
    assert contents(tmp_path / "same") == contents(tmp_path / "plain")


def test_a_set_has_its_name_only_when_complete(tmp_path):
    def breaks():
        yield "a", "png", b"1", 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(breaks(), tmp_path / "set", total=2, shard_size=1)
    assert not (tmp_path / "set").exists()
    assert (tmp_path / "set.partial" / "shard-000000.tar").exists()
    write_samples([("b", "png", b"2", 7)], tmp_path / "set", total=1)
    assert sorted(contents(tmp_path / "set")) == ["shard-000000.json", "shard-000000.tar"]
    assert not (tmp_path / "set.partial").exists()


@pytest.mark.parametrize("given", [1, 3])
def test_a_wrong_total_is_a_bug(tmp_path, given):
    with pytest.raises(ValueError, match="expected 2 samples"):
        write_samples([(str(n), "png", b"", 0) for n in range(given)], tmp_path / "set", total=2)
    assert not (tmp_path / "set").exists()


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
    with pytest.raises(UserError, match=message) as caught:
        write_image_folder(tmp_path / "source", tmp_path / "out", workers=workers, shortest_side=shortest_side)
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
from scalevit.data import commands
parser = argparse.ArgumentParser()
commands.add_arguments(parser)
commands.run(parser.parse_args(sys.argv[1:]))
"""
    script = tmp_path / "script.py"
    script.write_text(program)
    arguments = ["write", "--source", image_folder, "--destination", tmp_path / "out", "--workers", "1", "--seed", "3"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"writing {tmp_path / 'out'}: 23 samples in ")
    assert len(contents(tmp_path / "out")) == 3


def test_importing_the_command_is_cheap():
    program = (
        "import sys; from scalevit.data import commands; print([m for m in ('torch', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("option", ["--shard-size=0", "--workers=-1", "--shortest-side=0", "--quality=101"])
def test_command_refuses(option):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    name, _, value = option.partition("=")
    with pytest.raises(UserError, match=f"{name} = {value}: must be at "):
        run(parser.parse_args(["write", "--source", "a", "--destination", "b", option]))
