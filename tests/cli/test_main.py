"""The command: help of everything, unknown names, launchers' arguments, one line for a user's mistake."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from launching import ROOT, environment
from scalevit.cli import bench, main, parsing
from scalevit.cli.commands import CommandTable
from scalevit.config.loading import load_config, preset_names
from scalevit.terminal import format_bytes

COMMANDS = list(main.COMMANDS.commands)
BENCHMARKS = list(bench.COMMANDS.commands)
ACTIONS = [
    *("config show", "config diff", "config check"),
    *("shards write", "shards split", "shards show", "shards index", "shards verify", "shards plan"),
    *("checkpoint inspect", "checkpoint convert"),
]


def ended(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ending:
        main.main(arguments.split())
    captured = capsys.readouterr()
    return ending.value.code, captured.out, captured.err


@pytest.mark.parametrize("command", ["", *COMMANDS, *ACTIONS, *(f"bench {name}" for name in BENCHMARKS)])
def test_every_command_has_help_with_a_sentence_and_examples_that_parse(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = ended(f"{command} --help", capsys)
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: scalevit {command}".strip())
    assert re.search(r"^[A-Z][^\n]+\.$", out.split("\n\n")[1]), "the usage is followed by a sentence"
    found = examples(out)
    assert found
    for example in found:
        assert example.startswith(f"scalevit {command}".strip())
        arguments = shlex.split(example.partition(" > ")[0], comments=True)
        parsed(main.COMMANDS, arguments[1:])


def examples(text: str) -> list[str]:
    """The examples of a help text: the lines after "examples:", which are the last paragraph but for remarks."""
    _, heading, after = text.replace("\\\n", " ").partition("\n\nexamples:\n")
    assert heading
    return [line.strip() for line in after.split("\n\n")[0].splitlines()]


def parsed(table: CommandTable, arguments: list[str]) -> None:
    module, namespace = parsing.parse_module(*table.find(arguments[0]), arguments[1:])
    if nested := getattr(module, "COMMANDS", None):
        parsed(nested, [namespace.name, *namespace.rest])
    config = getattr(namespace, "config", None)
    overrides = [
        given for given in getattr(namespace, "overrides", []) if "=" in given
    ]  # `evaluate` takes a folder too
    load_config(config if config in preset_names() else None, overrides)


def test_the_package_runs_as_a_module() -> None:
    arguments = [sys.executable, "-m", "scalevit", "plan", "--help"]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: scalevit plan")


def test_every_action_is_among_those_whose_help_is_tested() -> None:
    found = []
    for name in COMMANDS:
        parser = parsing.CommandParser(prog=name)
        import_module(main.COMMANDS.find(name)[0]).add_arguments(parser)
        choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        found += [f"{name} {action}" for actions in choices for action in actions]
    assert found == ACTIONS


def test_sizes_have_three_digits() -> None:
    assert [format_bytes(count) for count in (0, 950, 999.6, 1_234_567, 5e12)] == [
        *("0 bytes", "950 bytes", "1 kB", "1.23 MB", "5 TB")
    ]


def test_help_lists_the_commands_and_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    overview, benchmarks = ended("--help", capsys)[1], ended("bench --help", capsys)[1]
    assert [name for name in COMMANDS if f"\n  {name} " not in overview] == []
    assert [name for name in BENCHMARKS if f"\n  {name} " not in benchmarks] == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("trian --config quickstart", ["'trian'", "nearest: train"]),
        ("train --config quickstart --confg x", ["scalevit train: unrecognized", "nearest: --config;", "--help"]),
        ("shards verify x --wokers 2", ["unrecognized arguments: --wokers 2; nearest: --workers"]),
        ("shards verfy x", ["invalid choice: 'verfy'", "nearest: verify"]),
        ("checkpoint convert a b --stage 5", ["scalevit checkpoint convert: argument --stage: invalid choice: 5"]),
        ("bench dat", ["'dat'", "nearest: data"]),
        ("bench data --rounds 0", ["scalevit bench data: argument --rounds: 0: must be at least 1; see"]),
        ("bench train --config quickstart --steps 1", ["argument --steps: 1: must be at least 2"]),
        ("shards plan --samples many", ["argument --samples: 'many' is not an integer"]),
        ("shards write --source a --destination b --quality 101", ["argument --quality: 101: must be at most 100"]),
        ("train --config qickstart", ["qickstart", "nearest: quickstart"]),
        ("train --config quickstart train.epoch=3", ["train.epoch = 3", "nearest: train.epochs"]),
        ("train train.epoch=3 --config quickstart seed=3", ["train.epoch = 3"]),
        ("--local_rank=0 train --local_rank 0 --config quickstart seed=x", ['seed = "x"', "an integer"]),
        ("evaluate --config quickstart", ["model.initial_weights = null"]),
        ("describe --config quickstart reduction.strategy=grupped", ["grupped", "nearest: grouped"]),
    ],
)
def test_a_mistake_is_one_line(arguments: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = ended(arguments, capsys)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "name"), [("", "COMMAND"), ("bench", "BENCHMARK"), ("train", "--config"), ("shards", "ACTION")]
)
def test_what_is_missing_is_named(arguments: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = ended(arguments, capsys)
    assert status == 2
    assert f"the following arguments are required: {name}; see scalevit" in err
    assert err.count("\n") == 1


def test_a_reader_that_ends_early_is_no_error() -> None:
    program = "from scalevit.cli.main import main; main(['schema'])"
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_help_schema_and_early_errors_import_no_torch() -> None:
    program = (
        "import sys; from scalevit.cli.main import main\n"
        "for arguments in (['--help'], ['train', '--help'], ['bench', '--help'], ['schema'],\n"
        "    ['plan', '--config', 'quickstart', '--gpus', '0'],\n"
        "    ['plan', '--config', 'quickstart', '--gpus', '2', '--device', 'h20'],\n"
        "    ['evaluate', '--config', 'quickstart'], ['checkpoint', 'convert', 'nowhere', 'x'],\n"
        "    ['checkpoint', 'convert', '.', 'x.onnx'], ['export', 'nowhere', 'x.pt2', '--to', 'torch'],\n"
        "    ['report', 'nowhere', '--output', 'x'],\n"
        "    ['sweep', '--config', 'quickstart', '--seeds', '2', '--only', '2'], ['runs', 'nowhere'],\n"
        "    ['predict', 'nowhere', 'x.png'], ['average', 'a', 'b', '--output', 'x.safetensors']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'timm')))"
    )
    assert subprocess.run([sys.executable, "-c", program], env=environment(), stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_the_launch_scripts_run_from_a_checkout_alone(script: str, tmp_path: Path) -> None:
    """In an isolated interpreter, which sees neither PYTHONPATH nor this folder, and with no installed scalevit."""
    blocker = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'scalevit' not in repr(f)]; "
    program = f"{blocker}import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    path = str(ROOT / "launch" / script)
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, path, "--config", "qickstart"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "nearest: quickstart" in done.stderr


def test_a_status_of_a_command_is_the_process_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_command.py").write_text(
        "EXAMPLES = ''\ndef add_arguments(parser): ...\ndef run(arguments): return 3\n"
    )
    monkeypatch.syspath_prepend(os.fspath(tmp_path))
    with pytest.raises(SystemExit, match="3"):
        parsing.run_module("a_command", "a command", "ends with 3", [])


def test_names_that_are_no_text_are_printed(tmp_path: Path) -> None:
    """A strict UTF-8 output cannot encode the bytes of such a name."""
    folder = tmp_path / "photos" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    Image.new("L", (4, 4)).save(folder / "1.png")
    arguments = ["shards", "write", "--source", str(tmp_path / "photos"), "--destination", str(tmp_path / "set")]
    done = subprocess.run(
        [sys.executable, "-m", "scalevit", *arguments, "--workers", "0"],
        env=environment(PYTHONIOENCODING="utf-8:strict"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert r"0 = caf\udce9" in done.stdout
