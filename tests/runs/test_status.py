"""The status of run folders: whole, damaged, foreign and missing ones, and locks that are looked at."""

import json
from pathlib import Path
from typing import Any

import pytest

from scalevit import files
from scalevit.runs.status import Best, failure_file, find_runs, planned_runs, read_status

NOW = 2_000.0
START = {"kind": "start", "step": 0, "steps": 40, "time": 1_000.0}
TRAIN = {"kind": "train", "step": 10, "epoch": 1, "loss": 2.0, "time": 1_010.0}
FIRST = {"kind": "evaluation", "step": 10, "epoch": 1, "top1": 50.0, "loss": 1.0, "ema_top1": 60.0, "time": 1_012.0}
SECOND = {"kind": "evaluation", "step": 20, "epoch": 2, "top1": 55.0, "loss": 1.5, "ema_top1": 58.0, "time": 1_022.0}
SUMMARY = {"top1": 55.0, "best_epoch": 2, "steps": 40, "ema": {"top1": 60.0, "best_epoch": 1}}


def write(run: Path, *records: dict[str, Any], summary: Any = None, config: Any = None) -> Path:
    run.mkdir(parents=True)
    config = {"train": {"epochs": 4}, "evaluation": {"metric": "top1"}} if config is None else config
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if summary is not None:
        (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_an_interrupted_run(tmp_path: Path) -> None:
    status = read_status(write(tmp_path / "a", START, TRAIN, FIRST, SECOND), now=NOW)
    assert (status.state, status.step, status.steps, status.epoch, status.epochs) == ("interrupted", 20, 40, 2, 4)
    assert status.best == {"weights": Best(55.0, 2), "ema": Best(60.0, 1)}
    assert (status.loss, status.seconds, status.changed) == (2.0, 22.0, 1_022.0)
    assert status.seconds_left is None, "nothing is computed"
    assert status.problem is None


def test_a_lock_makes_it_running_and_the_rate_is_that_of_the_last_process(tmp_path: Path) -> None:
    resume = {"kind": "resume", "step": 10, "steps": 40, "time": 1_900.0}
    later = {**TRAIN, "step": 20, "time": 1_930.0}
    run = write(tmp_path / "a", START, TRAIN, FIRST, resume, later, summary=SUMMARY)
    (run / "checkpoints").mkdir()
    held = files.lock(run / "checkpoints" / ".lock", wait=False)
    status = read_status(run, now=NOW)
    assert (status.state, status.seconds) == ("running", 12.0 + 30.0), "without the time in between"
    assert status.seconds_left == (40 - 20) * 30.0 / 10
    held.close()
    assert read_status(run, now=NOW).state == "finished"


def test_without_locks_a_folder_that_changes_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalevit.runs.status.is_locked", lambda path: None)
    run = write(tmp_path / "a", START, TRAIN)
    assert read_status(run, now=1_030.0).state == "running"
    assert read_status(run, now=NOW).state == "interrupted"


def test_a_finished_run_whose_records_are_gone(tmp_path: Path) -> None:
    status = read_status(write(tmp_path / "a", summary=SUMMARY), now=NOW)
    assert (status.state, status.step, status.steps) == ("finished", 40, 40)
    assert status.best == {"weights": Best(55.0, 2), "ema": Best(60.0, 1)}


def test_a_failed_and_a_planned_run(tmp_path: Path) -> None:
    run = tmp_path / "a"
    assert read_status(run).state == "not started"
    failure_file(run).parent.mkdir()
    failure_file(run).write_text('{"error": "no memory"}')
    status = read_status(run)
    assert (status.state, status.problem) == ("failed", "no memory")
    write(run, START, TRAIN)
    failure_file(run).write_text('{"error": "no memory", "time": 1011}')
    assert read_status(run).state == "failed"
    failure_file(run).write_text('{"error": "no memory", "time": 1009}')
    assert read_status(run).state == "interrupted", "it was started by hand since then"
    assert read_status(run, running=True).seconds_left == 30.0


def test_the_best_epoch_is_that_of_the_configs_metric(tmp_path: Path) -> None:
    run = write(tmp_path / "a", FIRST, SECOND, config={"evaluation": {"metric": "loss"}})
    assert read_status(run).best["weights"] == Best(50.0, 1)


def test_steps_of_a_run_that_recorded_none_follow_from_its_epochs(tmp_path: Path) -> None:
    assert read_status(write(tmp_path / "a", TRAIN, FIRST)).steps == 40


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", b"{", "config.json is damaged"),
        ("config.json", b"[" * 100_000, "config.json is damaged"),
        ("config.json", b'{"train": 3, "evaluation": {"metric": 5}}', None),
        ("summary.json", b"[1]", "summary.json is damaged"),
        ("summary.json", b"\xff", "summary.json is damaged"),
        ("metrics.jsonl", b"no JSON\n", "metrics.jsonl: 1 damaged lines"),
        ("metrics.jsonl", b'{"step": 3, "kind": "evaluation", "epoch": "x", "top1": NaN, "time": "y"}\n', None),
        ("metrics.jsonl", None, "metrics.jsonl cannot be read (Is a directory)"),
    ],
    ids=range(8),
)
def test_damage_is_named(name: str, content: bytes | None, problem: str | None, tmp_path: Path) -> None:
    run = write(tmp_path / "a", TRAIN)
    (run / name).unlink(missing_ok=True)
    if content is None:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(content)
    status = read_status(run, now=NOW)
    assert (status.state, status.problem) == ("interrupted", problem)


def test_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a", "sweep/one", "sweep/two", ".hidden/c"):
        write(tmp_path / name, TRAIN)
    write(tmp_path / "a" / "checkpoints" / "step", TRAIN)
    (tmp_path / "sweep" / "sweep.json").write_text('{"runs": {"two": {}, "three": {}, "../x": {}, "": {}}}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")  # of another library
    found = [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)]
    assert found == ["a", "b", "sweep/one", "sweep/three", "sweep/two"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    assert find_runs(tmp_path / "model") == []


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": 3}'])
def test_a_damaged_sweep_has_no_planned_runs(content: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(content)
    assert planned_runs(tmp_path) == []


def test_a_look_at_a_lock_does_not_keep_a_run_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"
    assert files.is_locked(path) is False
    assert not path.exists()
    with files.locked(path):
        assert files.is_locked(path) is True
    assert files.is_locked(path) is False
    # A look that is still under way when the run takes its lock.
    with path.open("rb") as looking:
        files.fcntl.flock(looking, files.fcntl.LOCK_SH)
        monkeypatch.setattr(files.time, "sleep", lambda seconds: looking.close())
        files.lock(path, wait=False).close()
