"""What became of a run: finished, running, interrupted, failed or not started; how far it is, and its best result.

Reads a run folder as it is found on the disk, damaged or foreign; writes nothing. Must not know how a run works.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from scalevit.files import is_locked
from scalevit.runs.records import Record, number, read_object, read_records, section
from scalevit.runs.summary import EMA, WEIGHTS, record_key, score_of

State = Literal["running", "finished", "interrupted", "failed", "not started"]
STATES: tuple[State, ...] = get_args(State)
FAILURES = "logs"
"""The folder beside run folders in which a sweep keeps what the runs print, and NAME.json of a failed one."""
SWEEP_FILE = "sweep.json"
# Where locks are unknown, a run is taken for running while its folder changes.
_SECONDS_FRESH = 120.0
# A run has metrics.jsonl, or config.json beside one of these; without them it may be anything.
_OF_A_RUN = ("environment.json", "summary.json")


@dataclass(frozen=True)
class Best:
    """The best evaluation of one weight set."""

    top1: float
    """In percent."""
    epoch: int | None
    """From 1."""


@dataclass(frozen=True)
class RunStatus:
    """One run as its folder has it. What is not known is None."""

    path: Path
    state: State
    step: int | None = None
    steps: int | None = None
    """Of the whole run."""
    epoch: int | None = None
    """The present or last one, from 1."""
    epochs: int | None = None
    loss: float | None = None
    """The latest of training."""
    best: Mapping[str, Best] = field(default_factory=dict)
    """By weight set."""
    seconds: float | None = None
    """Spent so far, without the time between an interruption and the resume."""
    seconds_left: float | None = None
    """At the present rate; only of a running one."""
    changed: float | None = None
    """When it last recorded something, in seconds since 1970."""
    problem: str | None = None
    """Why it failed, or which of its files is damaged."""

    @property
    def name(self) -> str:
        return self.path.name


def find_runs(folder: Path) -> list[Path]:
    """The run folders below a folder, or itself, by path; also those that a sweep has planned. Links are not followed.

    Raises:
        OSError: the folder cannot be read; those below it are passed over.
    """
    os.listdir(folder)
    found: set[Path] = set()
    for root, folders, names in os.walk(folder):
        here = Path(root)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if SWEEP_FILE in names:
            found.update(here / name for name in planned_runs(here))
        if "metrics.jsonl" in names or ("config.json" in names and any(name in names for name in _OF_A_RUN)):
            found.add(here)
            folders[:] = []
    return sorted(found)


def planned_runs(sweep: Path) -> list[str]:
    """The names of a sweep's runs; [] where its record cannot be read."""
    runs = read_object(sweep / SWEEP_FILE)[0].get("runs")
    return [name for name in runs if _is_name(name)] if isinstance(runs, Mapping) else []


def _is_name(text: str) -> bool:
    return text == Path(text).name and text not in ("", ".", "..") and "\x00" not in text


def failure_file(run: Path) -> Path:
    """Where a sweep records why a run has failed; there is none of a run that has not."""
    return run.parent / FAILURES / f"{run.name}.json"


def read_status(run: Path, *, running: bool = False, now: float | None = None) -> RunStatus:
    """The status of a run folder, which need not exist.

    Args:
        running: the caller knows that it runs; a process holds its lock only when it has opened its data.
        now: seconds since 1970; the present time by default.
    """
    now = time.time() if now is None else now
    config, problem = read_object(run / "config.json")
    summary, summary_problem = read_object(run / "summary.json")
    failure, _ = read_object(failure_file(run))
    try:
        records, damaged = read_records(run / "metrics.jsonl")
    except OSError as error:
        records, damaged = [], 0
        problem = problem or f"metrics.jsonl cannot be read ({error.strerror})"
    problem = problem or summary_problem or (f"metrics.jsonl: {damaged} damaged lines" if damaged else None)
    status = _with_progress(RunStatus(run, "not started", problem=problem), config, records, summary)
    status = replace(status, changed=_last_change(run, records))
    # A run that was started by hand since then has not failed.
    failed = bool(failure) and (number(failure.get("time")) or math.inf) >= (status.changed or 0)
    state: State = "running" if running else _state(run, bool(summary), failed, now - (status.changed or 0))
    if state == "failed":
        status = replace(status, problem=str(failure.get("error") or "ended without a message"))
    return replace(status, state=state, seconds_left=status.seconds_left if state == "running" else None)


def _state(run: Path, finished: bool, failed: bool, age: float) -> State:
    locked = is_locked(run / "checkpoints" / ".lock")
    if locked or (locked is None and not finished and age < _SECONDS_FRESH):
        return "running"
    if finished:
        return "finished"
    if failed:
        return "failed"
    return "interrupted" if run.is_dir() else "not started"


def _last_change(run: Path, records: Sequence[Record]) -> float | None:
    if records and (last := number(records[-1].get("time"))) is not None:
        return last
    files = (run / "metrics.jsonl", run / "environment.json", run / "config.json")
    times = [path.stat().st_mtime for path in files if path.exists()]
    return max(times, default=None)


# --- progress ---------------------------------------------------------------------------------------------


def _with_progress(
    status: RunStatus, config: Mapping[str, Any], records: Sequence[Record], summary: Mapping[str, Any]
) -> RunStatus:
    train = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    epochs = _whole(section(config, "train").get("epochs"))
    step = records[-1]["step"] if records else _whole(summary.get("steps"))
    numbered = [own for record in records if (own := _whole(record.get("epoch"))) is not None]
    steps = _total_steps(records, evaluations, epochs) or _whole(summary.get("steps"))
    return replace(
        status,
        step=step,
        steps=steps,
        epoch=numbered[-1] if numbered else None,
        epochs=epochs,
        loss=number(train[-1].get("loss")) if train else None,
        best=_best(evaluations, summary, str(section(config, "evaluation").get("metric", "top1"))),
        seconds=sum(last - first for first, last in _processes(records)) if records else None,
        seconds_left=_seconds_left(records, steps),
    )


def _total_steps(records: Sequence[Record], evaluations: Sequence[Record], epochs: int | None) -> int | None:
    named = [steps for record in records if (steps := _whole(record.get("steps"))) is not None]
    if named:
        return named[-1]
    # Of a run of an older version: an evaluation is at an epoch's end.
    ends = [(record["step"], epoch) for record in evaluations if (epoch := _whole(record.get("epoch")))]
    return round(ends[-1][0] / ends[-1][1] * epochs) if ends and epochs else None


def _by_process(records: Sequence[Record]) -> Iterator[list[Record]]:
    """The records with a time, in one list for each process that made them: a start or a resume begins it."""
    own: list[Record] = []
    for record in records:
        if record.get("kind") in ("start", "resume") and own:
            yield own
            own = []
        if number(record.get("time")) is not None:
            own.append(record)
    if own:
        yield own


def _processes(records: Sequence[Record]) -> Iterator[tuple[float, float]]:
    """The times of the first and of the last record of each process."""
    for own in _by_process(records):
        yield own[0]["time"], max(own[0]["time"], own[-1]["time"])


def _seconds_left(records: Sequence[Record], steps: int | None) -> float | None:
    """At the rate of the last process."""
    processes = list(_by_process(records))
    if not processes or steps is None:
        return None
    first, last = processes[-1][0], processes[-1][-1]
    done, seconds = last["step"] - first["step"], last["time"] - first["time"]
    return max(0, steps - last["step"]) * seconds / done if done > 0 and seconds > 0 else None


def _best(evaluations: Sequence[Record], summary: Mapping[str, Any], metric: str) -> dict[str, Best]:
    found: dict[str, Best] = {}
    for weight_set in (WEIGHTS, EMA):
        key, top1 = record_key(weight_set, metric), record_key(weight_set, "top1")
        scored = [record for record in evaluations if None not in (number(record.get(key)), number(record.get(top1)))]
        if scored:
            best = max(scored, key=lambda record: score_of(record[key], metric))
            found[weight_set] = Best(best[top1], _whole(best.get("epoch")))
            continue
        result = summary if weight_set == WEIGHTS else section(summary, weight_set)
        if (value := number(result.get("top1"))) is not None:
            found[weight_set] = Best(value, _whole(result.get("best_epoch")))
    return found


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None
