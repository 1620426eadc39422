"""Runs a sweep: one process for each run that is not finished. A failed one is recorded and does not end the others."""

import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Protocol

from scalevit.cluster.children import Children, Job, Stopping, last_lines
from scalevit.cluster.shares import Share
from scalevit.errors import UserError
from scalevit.files import write_whole
from scalevit.reports.sweeps.plan import SweepPlan, SweepRun
from scalevit.reports.sweeps.record import config_file
from scalevit.runs.status import FAILURES, RunStatus, failure_file, read_status

TRAIN = (sys.executable, "-m", "scalevit", "train")
"""The program that a run is made with; its arguments are those of `scalevit train`."""
_AN_ERROR = re.compile(r"(error: |([A-Za-z_]\w*\.)*[A-Z]\w*(Error|Exception|Interrupt|Exit)\b)")
_SECONDS_BETWEEN_READS = 1.0
# The exit statuses of a run that somebody else's signal has ended, with everything saved.
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class View(Protocol):
    """Shows a sweep to a person."""

    def started(self, run: SweepRun) -> None: ...
    def ended(self, run: SweepRun, status: RunStatus) -> None: ...
    def stopping(self, names: Sequence[str]) -> None:
        """Called once, before these runs are asked to save and end."""

    def refresh(self, statuses: Mapping[str, RunStatus]) -> None:
        """Called about once a second, with the status of every run by its name."""


@dataclass
class Execution:
    """The runs of one command; `run` makes them."""

    plan: SweepPlan
    runs: Sequence[SweepRun]
    """All that this command is about."""
    view: View | None = None
    statuses: dict[str, RunStatus] = field(default_factory=dict)
    """By name of the run."""
    stopped: int | None = None
    """The signal that ended the sweep early."""
    _started: dict[str, int] = field(default_factory=dict)
    """Where in its log a running run of this process began, by its name."""
    _read_at: float = 0.0

    def __post_init__(self) -> None:
        self.statuses = {run.name: read_status(run.folder) for run in self.runs}

    @property
    def waiting(self) -> list[SweepRun]:
        """Those that this command has to run: new, interrupted and failed ones."""
        return [run for run in self.runs if self.statuses[run.name].state not in ("finished", "running")]

    def run(self, shares: Sequence[Share], arguments: Sequence[str] = (), program: Sequence[str] = TRAIN) -> None:
        """Runs what is not finished.

        Args:
            shares: of the machine, one for each run beside others.
            arguments: further ones of each run: --ranks.
            program: that the arguments of `scalevit train` are given to. `write_record` has written their configs.

        Raises:
            UserError: the sweep's folder cannot be written.
        """
        jobs = [self._job(run, arguments, program) for run in self.waiting]
        by_name = {run.name: run for run in self.runs}
        try:
            (self.plan.folder / FAILURES).mkdir(parents=True, exist_ok=True)
            with Stopping().watching() as stopping:
                Children(shares, stopping).run(
                    jobs,
                    started=lambda job: self._begin(by_name[job.name], job),
                    ended=lambda job, status: self._end(by_name[job.name], job, status, stopping.signal),
                    asked=self._asked,
                    tick=self._tick,
                )
        except OSError as error:
            raise UserError(f"sweep folder {self.plan.folder}: cannot be written ({error.strerror or error})") from None
        self.stopped = stopping.signal

    def _job(self, run: SweepRun, arguments: Sequence[str], program: Sequence[str]) -> Job:
        command = [*program, "--config", str(config_file(run.folder)), *arguments]
        return Job(run.name, command, log_file(run))

    def _begin(self, run: SweepRun, job: Job) -> None:
        failure_file(run.folder).unlink(missing_ok=True)
        with job.log.open("a") as log:
            log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} $ {shlex.join(job.command)}\n")
            self._started[run.name] = log.tell()
        if self.view:
            self.view.started(run)

    def _end(self, run: SweepRun, job: Job, status: int, stopping: int | None) -> None:
        since = self._started.pop(run.name)
        if status and stopping is None and status not in _INTERRUPTED:
            record = {"status": status, "error": _reason(job.log, since, status), "time": round(time.time(), 3)}
            write_whole(failure_file(run.folder), (json.dumps(record) + "\n").encode())
        self.statuses[run.name] = read_status(run.folder)
        if self.view:
            self.view.ended(run, self.statuses[run.name])

    def _asked(self, jobs: Sequence[Job]) -> None:
        if self.view and jobs:
            self.view.stopping([job.name for job in jobs])

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._read_at > _SECONDS_BETWEEN_READS:
            self._read_at = now
            for run in self.runs:
                if run.name in self._started:
                    self.statuses[run.name] = read_status(run.folder, running=True)
            if self.view:
                self.view.refresh(self.statuses)

    def of_state(self, state: str) -> list[SweepRun]:
        """The runs in a state."""
        return [run for run in self.runs if self.statuses[run.name].state == state]


def log_file(run: SweepRun) -> Path:
    """What the processes of a run have printed."""
    return run.folder.parent / FAILURES / f"{run.name}.log"


def _reason(log: Path, since: int, status: int) -> str:
    """Why a run failed: the last line of its log that is an error's, or else the last line."""
    lines = last_lines(log, since=since)
    line = next((line for line in reversed(lines) if _AN_ERROR.match(line)), None)
    if status < 0:
        with suppress(ValueError):
            name = signal.Signals(-status).name
            memory = ", perhaps because memory did not suffice" if name == "SIGKILL" else ""
            return f"ended by {name}{memory}" + (f": {line}" if line else "")
    if line is None:
        return f"ended with status {status}" + (f"; its last line: {lines[-1]}" if lines else "")
    return line.removeprefix("error: ")


def seconds_left(statuses: Iterable[RunStatus], *, together: int) -> float | None:
    """Time until all runs have ended, from those that have and the rates of those that run; None before any is known.

    Args:
        together: how many run at the same time.
    """
    whole: list[float] = []
    left: list[float | None] = []
    for status in statuses:
        if status.state == "finished":
            whole += [status.seconds] if status.seconds else []
        elif status.state == "running" and status.seconds is not None and status.seconds_left is not None:
            whole.append(status.seconds + status.seconds_left)
            left.append(status.seconds_left)
        elif status.state != "failed":
            left.append(None)
    if not whole:
        return None
    usual = fmean(whole)
    return sum(usual if seconds is None else seconds for seconds in left) / max(1, min(together, len(left)))
