"""`scalevit shards`, as a user calls it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from launching import SECONDS
from scalevit.cli.parsing import CommandParser
from scalevit.cli.shards import add_arguments, run
from scalevit.data.images import decode_pixels
from scalevit.data.shards.index import load_index
from scalevit.errors import UserError


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def command(*arguments):
    parser = CommandParser(prog="scalevit shards")
    add_arguments(parser)
    run(parser.parse_args([*map(str, arguments)]))


def test_plan(shards, capsys):
    command("plan", "--samples", 50_000, "--image-bytes", 100_000, "--nodes", 2)
    assert "50,000 (5 GB)" in capsys.readouterr().out
    advice = "with a global batch that is a multiple of 96, nodes read fewer chunks in common"
    amplification = {}
    for global_batch in (1024, 960):
        command("plan", "--samples", 50_000, "--nodes", 5, "--global-batch", global_batch)
        shown = capsys.readouterr().out
        assert advice in shown or global_batch == 960
        amplification[global_batch] = float(re.search(r"read amplification (\S+)", shown)[1])
    assert amplification[960] < amplification[1024]
    command("plan", "--samples", 50_000, "--nodes", 2)
    assert advice not in capsys.readouterr().out
    command("plan", shards)
    assert "samples            23 (" in capsys.readouterr().out
    for arguments, message in (
        ((), "either shards or --samples"), (("--samples", 0), "argument --samples: 0: must be at least 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            command("plan", *arguments)


def test_index_and_verify_commands(shards, tmp_path, capsys):
    command("index", shards, "--checksums")
    shown = capsys.readouterr().out
    assert "23 samples of 3 labels in 3 shards, with checksums; 0 left out" in shown
    assert load_index(shards).fingerprint in shown
    command("verify", shards, "--workers", 0, "--num-classes", 3)
    shown = capsys.readouterr().out
    assert "note: 3 images: mode CMYK" in shown
    assert "no checksums" not in shown
    with pytest.raises(UserError, match=r"--report .*/no/where: cannot be written \(No such file"):
        command("verify", shards, "--report", tmp_path / "no" / "where")
    for option, value, lowest in (("--workers", -1, 0), ("--num-classes", 0, 1)):
        with pytest.raises(UserError, match=f"argument {option}: {value}: must be at least {lowest}"):
            command("verify", shards, option, value)
    others = tmp_path / "others"
    shutil.copytree(shards, others, ignore=shutil.ignore_patterns("*.json", ".*"))
    command("verify", others, "--workers", 0)
    assert "note: 3 shards have no checksums: flipped bytes" in capsys.readouterr().out
    report = tmp_path / "faults.jsonl"
    with pytest.raises(UserError, match=r"8 faults in 2 of 3 shards; all are listed in .*faults\.jsonl"):
        command("verify", shards, "--workers", 0, "--num-classes", 2, "--report", report)
    assert len(report.read_text().splitlines()) == 8
    assert "label 2 is not in 0..1" in capsys.readouterr().out


def test_write(image_folder, tmp_path):
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


def test_write_numbers_classes_as_asked_and_prints_their_names(tmp_path, capsys):
    for number in range(11):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
        Image.new("L", (8, 8), number).save(tmp_path / "images" / str(number) / "image.png")
    for order, classes in (("torchvision", "0 = 0, 1 = 1, 2 = 10, 3 = 2"), ("natural", "0 = 0, 1 = 1, 2 = 2, 3 = 3")):
        destination = tmp_path / order
        arguments = ["--source", tmp_path / "images", "--destination", destination, "--workers", 0]
        command("write", *arguments, "--class-order", order)
        printed = capsys.readouterr().out
        assert f"labels of the 11 classes (all in set.json): {classes}" in printed
        assert printed.endswith(", ...\n")
        names = json.loads((destination / "set.json").read_text())["classes"]
        assert names == sorted(names, key=None if order == "torchvision" else int)
        index = load_index(destination)
        for sample in range(11):
            with open(index.shards[0].path, "rb") as file:
                file.seek(index.offset[sample])
                pixels = decode_pixels(file.read(index.size[sample]))
            assert names[index.label[sample]] == str(pixels[0, 0, 0])


def test_write_names_its_options(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "bad.png").write_text("hello")
    (tmp_path / "images" / "a" / "worse.png").write_text("hello")
    with pytest.raises(UserError, match=r"^--max-faults = 1: found 2 bad images"):
        command("write", "--source", tmp_path / "images", "--destination", tmp_path / "out", "--max-faults", 1)


def test_importing_the_command_is_cheap():
    program = (
        "import sys; from scalevit.cli import shards; print([m for m in ('torch', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("option", ["--shard-size=0", "--workers=-1", "--shortest-side=0", "--quality=101"])
def test_command_refuses(option):
    parser = CommandParser(prog="scalevit shards")
    add_arguments(parser)
    name, _, value = option.partition("=")
    with pytest.raises(UserError, match=f"argument {name}: {value}: must be at "):
        run(parser.parse_args(["write", "--source", "a", "--destination", "b", option]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "x", "--split", "train"], "--split is not used with --source, only with --datasets"),
        (["--shards", "x", "--label-map", "m"], "--label-map is not used with --shards, only with --source, --table"),
        (["--source", "x", "--label-column", "c"], "--label-column is not used with --source, only with --table"),
        (["--table", "x.csv", "--label-key", "c"], "--label-key is not used with --table, only with --shards"),
        (["--class-archives", "x", "--labels", "c"], "--images and --labels belong together"),
    ],
)
def test_options_of_another_source_are_refused(tmp_path, arguments, message):
    for name, content in (("m", "a b"),):
        (tmp_path / name).write_text(content)
    arguments = [str(tmp_path / "m") if argument == "m" else argument for argument in arguments]
    with pytest.raises(UserError, match=re.escape(message)):
        command("write", *arguments, "--destination", tmp_path / "out")
