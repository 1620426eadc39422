"""`--ranks`: ranks on this machine without a launcher, and without a launcher's output."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from launching import QUICKSTART, SECONDS, Outcome, finish, metrics, run, start
from scalevit.cli.main import main

SMALL = ["model.kwargs.depth=2", "model.kwargs.embed_dim=24", "data.workers=0", "train.log_every_steps=1"]


def command(*settings: str) -> list[str]:
    return [sys.executable, "-m", "scalevit", "train", "--config", QUICKSTART, "--ranks", "2", *SMALL, *settings]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(digits)
    return folder


def test_two_ranks_print_what_one_prints(workplace: Path) -> None:
    outcome = run(command("train.max_steps=2"), cwd=workplace)
    assert outcome.status == 0, outcome.errors
    assert " device  2 x CPU" in outcome.output.replace("device", " device")
    assert "on 2 ranks; results in" in outcome.output
    assert [line.partition(":")[0] for line in outcome.errors.splitlines()] == ["epoch 1", "quickstart"]


def test_a_mistake_is_one_line_and_nothing_else(workplace: Path) -> None:
    outcome = run(command("data.builtin=null", "data.train=nowhere", "name=mistake"), cwd=workplace)
    assert outcome == Outcome(2, "", outcome.errors)
    assert outcome.errors.startswith("error: no shards at nowhere: ")
    assert outcome.errors.count("\n") == 1


def test_ctrl_c_saves_and_says_so_in_two_lines(workplace: Path) -> None:
    process = start(command("name=stopped"), cwd=workplace)
    folder = workplace / "runs" / "stopped"
    deadline = time.monotonic() + SECONDS
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 3:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "no step"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    outcome = finish(process)
    assert outcome.status == 128 + signal.SIGINT
    lines = [line for line in outcome.errors.splitlines() if not line.startswith(("epoch", "after", "stopped:"))]
    assert lines[0] == "stopping after this step"
    assert lines[1].startswith("stopped after step ")
    assert len(lines) == 2, outcome.errors
    assert (folder / "checkpoints" / "latest").exists()


@pytest.mark.parametrize(
    ("ranks", "environment", "message"),
    [
        ("2", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "a launcher has started this one already"),
        ("0", {}, "0: must be at least 1"),
        ("some", {}, "'some' is not an integer"),
    ],
)
def test_wrong_uses_are_one_line(
    ranks: str,
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as leaving:
        main(["train", "--config", QUICKSTART, "--ranks", ranks])
    assert leaving.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_torchrun_shows_the_mistake_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes the cause of a failure from this file."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit):
        main(["train", "--config", "quickstart", "optimizer.lrr=2"])
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    report = str(ChildFailedError("train.py", {0: failure})).splitlines()
    assert report[-2].startswith("  traceback : config: unknown key optimizer.lrr = 2")
