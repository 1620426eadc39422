"""How sweeps run: resumes, failures, shares of the machine, signals. A fake trainer replaces `scalevit train`."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from scalevit.cluster.shares import Share
from scalevit.reports.statistics import Spread
from scalevit.reports.sweeps.execution import Execution, log_file, seconds_left
from scalevit.reports.sweeps.plan import SweepPlan, SweepRun, make_plan
from scalevit.reports.sweeps.record import write_record
from scalevit.reports.sweeps.results import combine
from scalevit.runs.status import RunStatus, failure_file, read_status

FAKE = [sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "support" / "fake_trainer.py")]
CORES = tuple(sorted(os.sched_getaffinity(0)))
WHOLE = Share(CORES, None)


class Witness:
    """A view that notes what it is shown, and sends a signal when asked."""

    def __init__(self, plan: SweepPlan):
        self.plan, self.events, self.signals = plan, [], list[int]()

    def started(self, run: SweepRun) -> None:
        self.events.append(f"{run.name} started")

    def ended(self, run: SweepRun, status: RunStatus) -> None:
        self.events.append(f"{run.name} {status.state}")

    def stopping(self, names: Sequence[str]) -> None:
        self.events.append(f"stopping {', '.join(names)}")

    def refresh(self, statuses: Mapping[str, RunStatus]) -> None:
        ready = [run for run in self.plan.runs if (run.folder / "ready.json").exists()]
        if ready and self.signals:
            assert all(statuses[run.name].state == "running" for run in ready)
            os.kill(os.getpid(), self.signals.pop(0))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scalevit.reports.sweeps.execution._SECONDS_BETWEEN_READS", 0.0)
    monkeypatch.setattr("scalevit.cluster.children._SECONDS_BETWEEN_LOOKS", 0.005)
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before, "handlers are put back"


def sweep(
    act: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    shares: Sequence[Share] = (WHOLE,),
    signals: Sequence[int] = (),
    arguments: Sequence[str] = (),
) -> tuple[Execution, Witness]:
    plan = make_plan("quickstart", [], ["reduction=none,thin"], [1, 2])
    write_record(plan)
    monkeypatch.setenv("ACT", json.dumps(act))
    witness = Witness(plan)
    witness.signals = list(signals)
    execution = Execution(plan, plan.runs, witness)
    execution.run(shares, arguments, FAKE)
    return execution, witness


def test_runs_are_made_in_order_and_finished_ones_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    execution, witness = sweep({}, monkeypatch, arguments=["--ranks", "3"])
    names = ["none-seed1", "none-seed2", "thin-seed1", "thin-seed2"]
    assert witness.events == [f"{name} {event}" for name in names for event in ("started", "finished")]
    assert execution.stopped is None
    log = log_file(execution.runs[0]).read_text()
    assert "fake_trainer.py --config runs/quickstart-sweep/configs/none-seed1.json --ranks 3\n" in log
    assert "starting none-seed1 --ranks 3\n" in log
    again, witness = sweep({}, monkeypatch)
    assert (again.waiting, witness.events) == ([], [])


@pytest.mark.parametrize(
    ("act", "error"),
    [
        ("fail", "ValueError: the numbers are wrong"),
        ("mistake", "train.micro_batch = 7: does not fit"),
        ("kill", "ended by SIGKILL, perhaps because memory did not suffice"),
        ("silent", "ended with status 3; its last line: starting none-seed2"),
    ],
)
def test_a_failed_run_is_named_and_tried_again(act: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    execution, witness = sweep({"none-seed2": act}, monkeypatch)
    assert [event for event in witness.events if not event.endswith("started")] == [
        *("none-seed1 finished", "none-seed2 failed", "thin-seed1 finished", "thin-seed2 finished")
    ]
    (failed,) = execution.of_state("failed")
    assert execution.statuses[failed.name].problem == error
    assert read_status(failed.folder).problem == error, "`scalevit runs` says it too"
    _, witness = sweep({}, monkeypatch)
    assert witness.events == ["none-seed2 started", "none-seed2 finished"]
    assert not failure_file(failed.folder).exists()
    assert log_file(failed).read_text().count("starting none-seed2") == 2, "the log of the first try is kept"


def test_runs_beside_each_other_have_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two end only if both run at the same time."""
    shares = [Share(CORES[:1], ("4", "5")), Share(CORES[-1:], ("6",))]
    act = {"none-seed1": "meet none-seed2", "none-seed2": "meet none-seed1"}
    execution, witness = sweep(act, monkeypatch, shares=shares)
    assert witness.events[:2] == ["none-seed1 started", "none-seed2 started"]
    assert len(execution.of_state("finished")) == 4
    first, second = (json.loads((run.folder / "environment.json").read_text()) for run in execution.runs[:2])
    assert first == {"cores": [CORES[0]], "gpus": "4,5"}
    assert second == {"cores": [CORES[-1]], "gpus": "6"}
    assert tuple(sorted(os.sched_getaffinity(0))) == CORES, "this process keeps its own"


@pytest.fixture(autouse=True)
def signals_arrive() -> Iterator[None]:
    """Also where these tests are started with nohup or in the background of a script, which ignore SIGHUP or SIGINT."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_has_the_runs_save_and_starts_no_other(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    execution, witness = sweep({"none-seed2": "wait"}, monkeypatch, signals=[number])
    assert witness.events[-3:] == ["none-seed2 started", "stopping none-seed2", "none-seed2 interrupted"]
    assert execution.stopped == number
    assert (execution.runs[1].folder / "saved.json").exists()
    assert not failure_file(execution.runs[1].folder).exists()
    again, witness = sweep({"none-seed2": "wait"}, monkeypatch)
    assert witness.events[:2] == ["none-seed2 started", "none-seed2 finished"]
    assert len(again.of_state("finished")) == 4


def test_under_nohup_a_closed_terminal_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        act = {"none-seed1": "wait", "none-seed2": "wait"}
        execution, _ = sweep(act, monkeypatch, signals=[signal.SIGHUP, signal.SIGTERM])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert execution.stopped == signal.SIGTERM


def test_a_second_ctrl_c_ends_them_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    execution, witness = sweep({"none-seed1": "hang"}, monkeypatch, signals=[signal.SIGINT, signal.SIGINT])
    assert witness.events == ["none-seed1 started", "stopping none-seed1", "none-seed1 interrupted"]
    assert not (execution.runs[0].folder / "saved.json").exists()


def test_a_run_that_somebody_else_stops_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    execution, witness = sweep({"none-seed2": "preempted"}, monkeypatch)
    assert [event for event in witness.events if event.startswith("none-seed2")][-1] == "none-seed2 interrupted"
    assert len(execution.of_state("finished")) == 3


def test_it_runs_in_another_thread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no signal arrives."""
    done = []
    thread = threading.Thread(target=lambda: done.append(sweep({}, monkeypatch)[0]))
    thread.start()
    thread.join()
    assert len(done[0].of_state("finished")) == 4


def test_results_are_means_and_deviations_over_the_finished_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    execution, _ = sweep({"thin-seed2": "fail"}, monkeypatch)
    none, thin = combine(execution.runs)
    assert (none.combination, none.finished, none.runs) == ("reduction=none", 2, 2)
    assert none.top1 == {"ema": Spread(92.5, 0.5**0.5, 2), "weights": Spread(91.5, 0.5**0.5, 2)}
    assert none.gap["weights"] == Spread(0.375, pytest.approx(0.125 * 2**0.5), 2)
    assert str(none.top1["ema"]) == "92.50 ± 0.71"
    assert (thin.finished, thin.runs, str(thin.top1["weights"])) == (1, 2, "91.50"), "one run has no deviation"


def test_a_damaged_summary_counts_as_unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    execution, _ = sweep({}, monkeypatch)
    (execution.runs[0].folder / "summary.json").write_text("{")
    (execution.runs[2].folder / "summary.json").write_text('{"top1": null, "ema": null}')
    none, thin = combine(execution.runs)
    assert (none.finished, none.top1["weights"].std) == (1, None)
    assert (thin.finished, thin.top1) == (2, {}), "no number is made of the others"


def test_the_time_left() -> None:
    def status(state: str, seconds: float | None = None, left: float | None = None) -> RunStatus:
        return RunStatus(Path("a"), state, seconds=seconds, seconds_left=left)

    waiting, running = status("not started"), status("running", 30.0, 70.0)
    assert seconds_left([waiting, status("failed"), status("running")], together=1) is None
    assert seconds_left([status("finished", 200.0), running, waiting, waiting], together=1) == 70 + 2 * 150
    assert seconds_left([running, waiting, waiting], together=2) == (70 + 2 * 100) / 2
    assert seconds_left([running], together=2) == 70, "one run is not divided"
    assert seconds_left([status("finished", 5.0)], together=2) == 0
