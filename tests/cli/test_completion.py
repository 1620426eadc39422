"""The scripts of `scalevit completion`: bash's in a real bash, the others' syntax where their shells are installed."""

import argparse
import io
import shlex
import shutil
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from launching import SECONDS
from scalevit.cli import completion
from scalevit.config.loading import preset_names


def script(shell: str) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        completion.run(argparse.Namespace(shell=shell))
    return printed.getvalue()


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "scalevit.bash"
    path.write_text(script("bash"))
    return path


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["sh"], ["shards"]),
        (["shards", "wr"], ["write"]),
        (["bench", "ker"], ["kernels"]),
        (["repo"], ["report"]),
        (["report", "--base"], ["--baseline"]),
        (["plan", "--dev"], ["--device"]),
        (["plan", "--device", "h2"], ["h200"]),
        (["checkpoint", "convert", "a", "b", "--stage", ""], ["0", "1", "2", "3"]),
        (["bench", "kernels", "--dtype", "b"], ["bfloat16"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["train", "--config", ""], preset_names()),
        (["config", "diff", "grouped", "qu"], ["quickstart"]),
        (["config", "show", "train.epo"], ["train.epochs"]),
        (["config", "show", "tracking.wandb.en"], ["tracking.wandb.enabled", "tracking.wandb.entity"]),
        (["train", "--config", "grouped", "train.epochs", "=", "3", "train.epo"], ["train.epochs="]),
        (["train", "--config", "grouped", "model.kw"], ["model.kwargs="]),
        (["sweep", "--config", "grouped", "--vary", "optimizer.lr_b"], ["optimizer.lr_base_batch="]),
        (["sweep", "--par"], ["--parallel"]),
        # Nothing, so that bash completes files.
        (["train", "data.train", "=", "data"], []),
        (["train", "data.train", "="], []),
        (["evaluate", "runs/"], []),
        (["shards", "verify", "data/"], []),
    ],
)
def test_bash_completes(words: list[str], completed: list[str], bash_script: Path) -> None:
    """The words are as bash splits them, at = too."""
    program = (
        f"source {shlex.quote(str(bash_script))}; COMP_WORDS=({shlex.join(['scalevit', *words])})\n"
        # Outside of a completion `compopt` has nothing to set.
        f'compopt() {{ :; }}; COMP_CWORD={len(words)}; _scalevit; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-c", program], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.stderr == ""
    assert done.stdout.split() == completed


@pytest.mark.parametrize(("shell", "check"), [("zsh", "-n"), ("fish", "--no-execute")])
def test_other_shells(shell: str, check: str, tmp_path: Path) -> None:
    text = script(shell)
    for part in ("shards", "verify", "quickstart", "train.epochs=", "bfloat16", "max-faults"):
        assert part in text
    if shutil.which(shell) is None:
        return
    (tmp_path / "script").write_text(text)
    done = subprocess.run([shell, check, tmp_path / "script"], capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
