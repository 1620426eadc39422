"""`make gpu`, as far as it can be tested without a GPU: time budgets, records, and commands that parse."""

import argparse
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import gpu_session
from gpu_session import Part
from launching import SECONDS
from scalevit.kernels import bench
from scalevit.kernels.tuning import tuner


def test_budgets_add_up_to_under_nine_minutes(tmp_path: Path) -> None:
    assert sum(part.seconds for part in gpu_session.parts(tmp_path)) <= 530


def test_every_part_leaves_its_record(tmp_path: Path) -> None:
    """One that passes, one that fails, one that hangs with a child of its own, one that cannot run, one too late."""
    hang = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    chosen = [
        Part("hanging", 5, ("-c", hang)),
        Part("good", 60, ("-c", "import os; print(os.environ['SCALEVIT_TUNING'])")),
        Part("bad", 60, ("-c", "raise SystemExit('broken')")),
        Part("missing", 60, ("-c", ""), needs=("no_such_module",)),
    ]
    outcomes = gpu_session.run_session(chosen, tmp_path, 60 + 60 + 60 + 5, {"device": "none"})
    assert [o.status for o in outcomes] == ["out of time", "passed", "failed", "skipped"]
    record = json.loads((tmp_path / "session.json").read_text())
    assert record["device"] == "none"
    last = {part["name"]: part["last"] for part in record["parts"]}
    assert last == {
        "good": [str(tmp_path / "tuning")],
        "bad": ["broken"],
        "hanging": ["begun"],
        "missing": ["no_such_module is not installed"],
    }
    assert {path.name for path in tmp_path.iterdir()} == {"session.json", "good.log", "bad.log", "hanging.log"}
    (late,) = gpu_session.run_session(chosen[1:2], tmp_path, 0, {})
    assert late.last == ["no time was left"]


def test_packed_results_are_two_files(tmp_path: Path) -> None:
    write = "import pathlib; pathlib.Path('folder').mkdir(); pathlib.Path('folder/numbers.csv').write_text('1')"
    work, packed = tmp_path / "work", tmp_path / "packed"
    chosen = [Part("first", 30, ("-c", write)), Part("second", 30, ("-c", ""))]
    gpu_session.run_session(chosen, work, 60, {}, packed)
    assert {path.name for path in packed.iterdir()} == {"session.json", "results.tar.gz"}
    with tarfile.open(packed / "results.tar.gz") as file:
        names = set(file.getnames())
    assert names == {"first.log", "second.log", "folder", "folder/numbers.csv"}


def test_pack_leaves_the_parts_a_folder_of_their_own(tmp_path: Path, monkeypatch) -> None:
    script = "import sys; open(sys.argv[1] + '/a.txt', 'w')"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_session, "describe", dict)
    monkeypatch.setattr(gpu_session, "parts", lambda work: [Part("only", 30, ("-c", script, str(work)))])
    assert gpu_session.main(["--output", str(tmp_path), "--pack"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"session.json", "results.tar.gz"}


@pytest.mark.parametrize("found", [None, "git"])
def test_describes_a_machine_without_git(monkeypatch, found) -> None:
    def run(command, **_):
        if found is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, "abc\n", "")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "test")
    monkeypatch.setattr(gpu_session.shutil, "which", lambda name: found)
    monkeypatch.setattr(gpu_session.subprocess, "run", run)
    assert gpu_session.describe()["commit"] == ("abc" if found else None)


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_session.main(["--output", str(tmp_path / "out")]) == 0
    assert "no GPU on this machine" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_commands_parse(tmp_path: Path, monkeypatch) -> None:
    """Otherwise an invalid argument would only be noticed on a machine with a GPU."""
    commands = {part.name: part.command for part in gpu_session.parts(tmp_path)}
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert parser.parse_args(commands["bench"][2:]).output == tmp_path
    assert parser.parse_args(commands["autotune"][2:]).output == tmp_path / "autotune"
    both = set(commands["bench"]) | set(commands["autotune"])
    assert both >= set(bench.PROVIDERS), "every provider is in one of the two parts"
    assert bench.SLOWEST not in commands["bench"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuner.main(list(commands["tuning"][2:])) == 2  # no device; wrong arguments raise SystemExit
    assert Path(commands["tests"][-1]).is_dir()
    assert Path(commands["parity"][0]).is_file()
    assert Path(commands["train"][commands["train"].index("--config") + 1]).is_file()


@pytest.mark.parametrize("name", ["scalevit.kernels", "scalevit.errors"])
def test_a_checkout_that_is_not_installed_is_found(tmp_path: Path, name: str) -> None:
    """-S leaves out installed packages, including torch, so the module is only looked up."""
    script = f"import importlib.util as u; print(u.find_spec({name!r}).origin)"
    variables = gpu_session.part_environment(tmp_path)
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert str(gpu_session.ROOT / "scalevit") in done.stdout


def test_the_tool_imports_its_own_checkout(tmp_path: Path) -> None:
    """Without an installed scalevit: finders and paths that lead to one are removed first."""
    script = f"""
import sys
from importlib.util import find_spec
from pathlib import Path
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in str(getattr(f, "__module__", ""))]
sys.path = [p for p in sys.path if not (Path(p) / "scalevit").exists()]
assert find_spec("scalevit") is None
sys.path.insert(0, {str(Path(gpu_session.__file__).parent)!r})
import gpu_session, scalevit.kernels
print(scalevit.kernels.__file__)
"""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(gpu_session.ROOT / "scalevit" / "kernels" / "__init__.py")
