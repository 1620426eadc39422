"""Trackers: what each writes, what a resumed run cuts, and that none but metrics.jsonl ends a run."""

import csv
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Literal

import pytest

from launching import SECONDS, environment
from scalevit.config.loading import load_config
from scalevit.errors import SettingError, UserError, require
from scalevit.runs.records import Record, read_records
from scalevit.runs.summary import Summary
from scalevit.runs.trackers import TRACKERS
from scalevit.runs.trackers.base import RunInfo, Tracker
from scalevit.runs.trackers.csv_tracker import CsvTracker
from scalevit.runs.trackers.tensorboard_tracker import TensorBoardTracker
from scalevit.runs.trackers.wandb_tracker import WandbTracker
from scalevit.runs.tracking import Tracking
from scalevit.training.run import prepare


class RecordingTracker(Tracker):
    """Keeps its calls in a list, and fails at a step."""

    name: Literal["recording"] = "recording"
    calls: list[Any] = []
    fails_at: int = 0

    def open(self, run: RunInfo, saved: str | None) -> str | None:
        self.calls.append(("open", saved))
        return f"{saved or 'new'}+"

    def log(self, record: Record) -> None:
        self.calls.append(record["step"])
        if record["step"] == self.fails_at:
            raise OSError(28, "No space left on device")

    def close(self, summary: Summary | None) -> None:
        self.calls.append("close")


def info(folder: Path, step: int = 0) -> RunInfo:
    return RunInfo("a", folder, {}, step)


def record(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, **values}


def test_a_tracker_that_fails_is_reported_once_and_the_others_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, whole = RecordingTracker(fails_at=2), RecordingTracker()
    tracking = Tracking([broken, whole])
    assert tracking.open(info(tmp_path), {"recording": "id", "other": "kept"}) == {"recording": "id+", "other": "kept"}
    for step in (1, 2, 3, 4):
        tracking.log(record(step))
    tracking.close(None)
    tracking.close(None)
    assert broken.calls == [("open", "id"), 1, 2]
    assert whole.calls == [("open", "id"), 1, 2, 3, 4, "close"]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "tracker recording failed at step 2" in warnings[0]
    assert "No space left on device" in warnings[0]
    assert [line["step"] for line in read_records(tmp_path / "metrics.jsonl")[0]] == [1, 2, 3, 4]


def test_a_tracker_that_cannot_be_opened_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Tracker, run: RunInfo, saved: str | None) -> None:
        raise RuntimeError("no\nserver")

    monkeypatch.setattr(RecordingTracker, "open", fails)
    with pytest.raises(
        SettingError, match=r"^recording\.enabled = true: cannot be opened \(RuntimeError: no server\)$"
    ):
        Tracking([RecordingTracker()]).open(info(tmp_path), {})


def test_metrics_that_cannot_be_written_end_the_run_in_one_line(tmp_path: Path) -> None:
    tracking = Tracking([])
    tracking.open(info(tmp_path), {})
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(Is a directory\)"):
        tracking.log(record(1))
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written"):
        Tracking([]).open(info(tmp_path), {})


def test_a_resumed_run_keeps_earlier_records_and_drops_damaged_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [b'{"kind": "train", "step": 1, "loss": 0.1}', b"\xff\x00", b'{"kind": "train"}', b"[3]", b"[" * 100_000]
    lines += [b'{"kind": "train", "step": "2"}', b'{"kind": "train", "step": 2, "loss": NaN}', b'{"step": 3}']
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines) + b'\n{"kind": "train", "st')
    Tracking([]).open(info(tmp_path, step=2), {})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        record(1, loss=0.1),
        record(2, loss=None),
    ]
    assert "removed 5 damaged lines" in capsys.readouterr().err


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    tracking = Tracking([])
    tracking.open(info(tmp_path), {})
    tracking.log(record(1, loss=float("nan"), grad_norm=float("inf"), mfu=None))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record(1, loss=None, grad_norm=None, mfu=None)


def test_the_table_of_records_grows_columns_and_follows_a_resume(tmp_path: Path) -> None:
    def rows() -> list[dict[str, str]]:
        with (tmp_path / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    tracking = Tracking([CsvTracker()])
    tracking.open(info(tmp_path), {})
    tracking.log(record(1, loss=2.5))
    tracking.log(record(2, loss=float("nan")))
    tracking.log({"kind": "evaluation", "step": 2, "top1": 50.0})
    tracking.log(record(3, loss=1.5))
    assert [row["step"] for row in rows()] == ["1", "2", "2", "3"]
    assert [row["loss"] for row in rows()] == ["2.5", "", "", "1.5"]
    assert [row["top1"] for row in rows()] == ["", "", "50.0", ""]
    resumed = Tracking([CsvTracker()])
    resumed.open(info(tmp_path, step=2), {})
    resumed.log(record(3, loss=1.25))
    assert [(row["step"], row["loss"]) for row in rows()][-2:] == [("2", ""), ("3", "1.25")]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the modules of tensorboard that the tracker uses; collects what is written."""
    written: list[Any] = []

    class Writer:
        def __init__(self, folder: str):
            self.folder = folder

        def add_event(self, event: Any) -> None:
            written.append(event)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            written.append("closed")

    class Scalars(types.SimpleNamespace):
        Value = types.SimpleNamespace

    class SessionLog(types.SimpleNamespace):
        START = 1

    modules: dict[str, dict[str, Any]] = {
        "tensorboard": {"__spec__": types.SimpleNamespace(origin="somewhere")},
        "tensorboard.compat": {},
        "tensorboard.compat.proto": {},
        "tensorboard.compat.proto.event_pb2": {"Event": types.SimpleNamespace, "SessionLog": SessionLog},
        "tensorboard.compat.proto.summary_pb2": {"Summary": Scalars},
        "tensorboard.summary": {},
        "tensorboard.summary.writer": {},
        "tensorboard.summary.writer.event_file_writer": {"EventFileWriter": Writer},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return written


def test_tensorboard_gets_numbers_and_hides_what_is_computed_again(events: list[Any], tmp_path: Path) -> None:
    tracker = TensorBoardTracker(enabled=True)
    tracker.check()
    tracking = Tracking([tracker])
    tracking.open(info(tmp_path, step=10), {})
    tracking.log(record(11, loss=0.5, grad_norm=float("nan"), mfu=None))
    tracking.close(None)
    start, scalars, end = events
    assert (start.step, start.session_log.status) == (11, 1)
    assert (scalars.step, {value.tag: value.simple_value for value in scalars.summary.value}) == (
        11,
        {"train/loss": 0.5},
    )
    assert end == "closed"


def test_the_written_event_files_are_read_by_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, loss in ((0, 2.0), (2, 1.0)):
        tracking = Tracking([TensorBoardTracker(enabled=True)])
        tracking.open(info(tmp_path, step=first), {})
        for step in range(first + 1, first + 4):
            tracking.log(record(step, loss=loss))
        tracking.close(None)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = {event.step: event.value for event in events.Scalars("train/loss")}
    assert points == {1: 2.0, 2: 2.0, 3: 1.0, 4: 1.0, 5: 1.0}


@pytest.mark.parametrize("tracker", [TensorBoardTracker(enabled=True), WandbTracker(enabled=True)])
def test_a_missing_package_is_named_with_its_extra(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalevit.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'scalevit\[{tracker.name}\]'"):
        Tracking([tracker]).check()


def test_a_setting_that_check_refuses_is_named_with_its_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Tracker) -> None:
        raise SettingError("mode", "online", "needs a key")

    monkeypatch.setattr(WandbTracker, "check", fails)
    config = load_config(None, ["tracking.wandb.enabled=true", f"output_dir={tmp_path}"])
    with pytest.raises(UserError, match=r'^config: tracking\.wandb\.mode = "online": needs a key$'):
        prepare(config)


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_package_here").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'no_such_package_here' is not installed"):
        require("no_such_package_here", extra="x")


def test_wandb_offline_returns_an_id_that_a_resumed_run_hands_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []

    def init(**arguments: Any) -> Any:
        run = types.SimpleNamespace(
            id=arguments["id"] or "abc",
            logged=[],
            log=lambda numbers, step: run.logged.append((step, numbers)),
            finish=lambda: run.logged.append("finished"),
        )
        runs.append(arguments)
        return run

    wandb = types.ModuleType("wandb")
    wandb.init, wandb.Error = init, type("Error", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tokens = Tracking([WandbTracker(mode="offline")]).open(info(tmp_path), {})
    assert tokens == {"wandb": "abc"}
    Tracking([WandbTracker(mode="offline")]).open(info(tmp_path, step=3), tokens)
    Tracking([WandbTracker()]).open(info(tmp_path, step=3), tokens)
    assert [(arguments["id"], arguments["mode"]) for arguments in runs] == [
        *((None, "offline"), ("abc", "offline")),
        ("abc", None),
    ]
    wandb.init = lambda **arguments: (_ for _ in ()).throw(wandb.Error("no\nnetwork"))  # type: ignore[attr-defined]
    with pytest.raises(SettingError, match=r'wandb\.mode = "online": wandb cannot start a run \(no network\)'):
        Tracking([WandbTracker(mode="online")]).open(info(tmp_path), {})


@pytest.mark.parametrize(
    ("variable", "mode", "files"),
    [("disabled", None, False), ("offline", None, True), ("disabled", "offline", True), ("of", None, None)],
)
def test_wandb_follows_its_environment_variable_unless_the_config_has_a_mode(
    variable: str, mode: str | None, files: bool | None, tmp_path: Path
) -> None:
    """In a process of its own, because wandb reads its environment once."""
    pytest.importorskip("wandb")
    program = (
        "from pathlib import Path; from scalevit.runs.tracking import Tracking\n"
        "from scalevit.runs.trackers.base import RunInfo\n"
        "from scalevit.runs.trackers.wandb_tracker import WandbTracker\n"
        f"tracking = Tracking([WandbTracker(enabled=True, mode={mode!r})])\n"
        "assert tracking.open(RunInfo('a', Path(), {}, 0), {'wandb': 'abc'}) == {'wandb': 'abc'}\n"
        "tracking.log({'kind': 'train', 'step': 1, 'loss': 0.5}); tracking.close(None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(WANDB_MODE=variable),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if files is None:
        last = done.stderr.splitlines()[-1]
        assert "SettingError: " in last
        assert "wandb.mode = null: wandb cannot start a run" in last
        assert "Input should be 'online', 'offline'" in last
    else:
        assert done.returncode == 0, done.stderr
        assert "failed" not in done.stderr
        assert bool(list(tmp_path.glob("wandb/offline-run-*"))) == files


def test_every_tracker_is_off_and_has_its_section(tmp_path: Path) -> None:
    assert load_config(None).tracking.enabled == []
    for part in TRACKERS:
        enabled = load_config(None, [f"tracking.{part.kind()}.enabled=true"]).tracking.enabled
        assert [type(tracker) for tracker in enabled] == [part]
