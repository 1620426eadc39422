"""Child processes beside each other, each with a log: start, wait, stop. Must not know what they do."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from scalevit.cluster.shares import Share

_SECONDS_BETWEEN_LOOKS = 0.1
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LONGEST_END = 65_536


@dataclass(frozen=True)
class Job:
    """What a child runs."""

    name: str
    command: Sequence[str]
    log: Path
    """Its output and errors are added to this file, whose folder exists."""


@dataclass
class Stopping:
    """Whether a signal has asked this process to stop."""

    signal: int | None = None
    again: bool = False
    """Whether it was asked a second time by Ctrl-C, so that children are killed."""

    @contextmanager
    def watching(self) -> Iterator["Stopping"]:
        """Takes SIGINT, SIGTERM and SIGHUP while the block runs; only in the main thread, where signals arrive.

        One that is ignored stays so: nohup ignores SIGHUP.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        taken = [number for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._receive) for number in taken}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            self.again = True
        self.signal = self.signal or number


@dataclass
class Children:
    """Runs jobs, each on a share of the machine, as many beside each other as there are shares."""

    shares: Sequence[Share]
    stopping: Stopping
    _running: dict[int, tuple[Job, "subprocess.Popen[bytes]"]] = field(default_factory=dict)
    """By number of the share."""

    def run(
        self,
        jobs: Sequence[Job],
        *,
        started: Callable[[Job], None],
        ended: Callable[[Job, int], None],
        asked: Callable[[Sequence[Job]], None],
        tick: Callable[[], None],
    ) -> None:
        """Runs all jobs in their order, or stops them when `stopping` says so. A failing one does not end the others.

        Args:
            started: called before a job is started.
            ended: called with the exit status of a job, a negative one of a signal.
            asked: called before running jobs are asked to end.
            tick: called several times a second.
        """
        waiting = list(jobs)
        sent: list[int] = []
        try:
            while self._running or (waiting and self.stopping.signal is None):
                for number, share in enumerate(self.shares):
                    if waiting and number not in self._running and self.stopping.signal is None:
                        job = waiting.pop(0)
                        started(job)
                        self._running[number] = job, _start(job, share)
                if self.stopping.signal is not None and not sent:
                    asked([job for job, _ in self._running.values()])
                    sent.append(signal.SIGTERM)  # not SIGINT, which processes of a script's background ignore
                    self._send(signal.SIGTERM)
                if self.stopping.again and signal.SIGKILL not in sent:
                    sent.append(signal.SIGKILL)
                    self._send(signal.SIGKILL)
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                for number, (job, process) in list(self._running.items()):
                    if (status := process.poll()) is not None:
                        del self._running[number]
                        ended(job, status)
                tick()
        finally:
            self._send(signal.SIGTERM)  # where an error ends this; otherwise none is left

    def _send(self, number: int) -> None:
        """Sends a signal to the children and to what they have started, as a terminal does."""
        for _, process in self._running.values():
            if process.poll() is None:
                os.killpg(process.pid, number)


def _start(job: Job, share: Share) -> "subprocess.Popen[bytes]":
    """In a process group of its own: a Ctrl-C on the terminal reaches this process, which passes it on once."""
    with job.log.open("ab") as log, _on_cores(share.cores):
        return _popen(job.command, log, {**os.environ, **share.environment()})


def _popen(command: Sequence[str], log: BinaryIO, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


@contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Has what the block starts inherit these cores from this thread."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def last_lines(log: Path, *, since: int = 0) -> list[str]:
    """The lines at the end of a log that have text.

    Args:
        since: bytes that earlier processes have written.
    """
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(since, size - _LONGEST_END))
        lines = file.read().decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]
