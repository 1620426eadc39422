"""What a person sees on the terminal: progress of a long count, tables, and sizes. Knows nothing of their subject."""

import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Counts up to `total`, on standard error, with rate and remaining time; use as a context manager."""

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0, visible: bool = True) -> None:
        """
        Args:
            title: what is going on.
            total: where the count ends.
            unit: what is counted, in the plural.
            done: where the count begins (a resumed run).
            visible: False shows nothing (ranks other than the first).
        """
        self.title, self.total, self.unit = title, total, unit
        self.done = self._first = done
        self._visible = visible
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal and visible:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=console)
            self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> "ProgressBar":
        self._started = self._first_done = self._last_line = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def advance(self, note: str = "") -> None:
        """One more; `note` is shown beside the count, or else the rate."""
        self.done += 1
        now = time.monotonic()
        if self.done == self._first + 1:
            self._first_done = now
        if self._bar:
            shown = note or f"{self._rate(now):.0f} {self.unit}/s"
            self._bar.update(self._task, advance=1, note=shown)
        elif now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            remaining = format_duration((self.total - self.done) / self._rate(now))
            shown = note or f"{self._rate(now):.0f}/s"
            self.line(f"{self.title}: {self.done}/{self.total} {self.unit}, {shown}, {remaining} left")

    def line(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if not self._visible:
            return
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None:
            now = time.monotonic()
            elapsed, count = format_duration(now - self._started), self.done - self._first
            self.line(f"{self.title}: {count} {self.unit} in {elapsed}, {self._rate(now):.1f}/s")

    def _rate(self, now: float) -> float:
        """Without the first, which may take longer, as soon as there is another."""
        count = self.done - self._first
        if count > 1:
            return (count - 1) / max(now - self._first_done, 1e-9)
        return max(count, 1e-9) / max(now - self._started, 1e-9)


def format_duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 07 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_bytes(count: float) -> str:
    """950 bytes, 1.23 MB; three digits, decimal units."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def narrow_table(*headings: str, text: Collection[str], title: str | None = None) -> Table:
    """A table without lines between its columns, for many of them.

    Args:
        headings: of the columns.
        text: headings of columns that are aligned to the left; the others have numbers.
        title: above the table.
    """
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0)
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in text else "right")
    return table


def print_table(table: Table, *notes: str) -> None:
    """Prints a table at its full width, never cut off however narrow the terminal is, then notes as lines."""
    console = Console()
    needed = Console(width=10_000).measure(table).maximum  # a console measures no wider than it is
    wide = Console(width=max(console.width, needed))
    wide.print(table)
    for note in notes:
        wide.print(note, highlight=False, markup=False, soft_wrap=True)


def print_notes(notes: Iterable[str]) -> None:
    """Prints each note as a paragraph, broken at the terminal's width, at 100 columns at most."""
    width = min(Console().width, 100)
    for note in notes:
        print(textwrap.fill(note, width, break_long_words=False, break_on_hyphens=False))


@contextmanager
def progress_text(first: str) -> Iterator[Callable[[str], None]]:
    """Shows what is done at present, on a terminal's standard error only; the caller changes it by the callback."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(first) as status:
        yield status.update
