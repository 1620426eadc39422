"""Progress of a long count: a bar on a terminal, now and then a plain line elsewhere. Knows nothing of data."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class Counter:
    """Counts up to `total`, on standard error, with rate and remaining time; use as a context manager."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=console)
            self._task = self._bar.add_task(title, total=total, rate="")

    def __enter__(self) -> "Counter":
        self._started = self._last_line = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, advance=1, rate=f"{self._rate(now):.0f} {self.unit}/s")
        elif now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            remaining = (self.total - self.done) / self._rate(now)
            self._line(f"{self.done}/{self.total} {self.unit}, {self._rate(now):.0f}/s, {remaining:.0f} s left")

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None:
            now = time.monotonic()
            self._line(f"{self.done} {self.unit} in {now - self._started:.1f} s, {self._rate(now):.0f}/s")

    def _rate(self, now: float) -> float:
        return self.done / max(now - self._started, 1e-9)

    def _line(self, text: str) -> None:
        print(f"{self.title}: {text}", file=sys.stderr, flush=True)
