"""What a person sees of a sweep: a live table on a terminal, lines elsewhere; its runs before, its results after."""

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scalevit.cli.status_cells import COLORS, LABELS, best_top1, duration, of_total, results_text
from scalevit.reports.sweeps.execution import log_file, seconds_left
from scalevit.reports.sweeps.plan import SweepRun
from scalevit.reports.sweeps.results import CombinationResult
from scalevit.runs.status import STATES, RunStatus
from scalevit.runs.summary import EMA, WEIGHTS
from scalevit.terminal import format_duration, narrow_table, print_table

_SECONDS_BETWEEN_LINES = 60.0
# Of a terminal's height, for what is above and below the table.
_OTHER_LINES = 8
_BY_INTEREST = ("running", "failed", "interrupted", "not started", "finished")


class SweepView:
    """Shows a sweep while it runs, on standard error; use as a context manager."""

    def __init__(self, runs: Sequence[SweepRun], *, together: int) -> None:
        """
        Args:
            runs: all of the sweep.
            together: how many run at the same time.
        """
        self._runs, self._together = {run.name: run for run in runs}, together
        self._console = Console(stderr=True)
        self._live: Live | None = None
        self._statuses: Mapping[str, RunStatus] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> "SweepView":
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def started(self, run: SweepRun) -> None:
        if not self._live:
            self._line(f"{run.name}: started")

    def ended(self, run: SweepRun, status: RunStatus) -> None:
        match status.state:
            case "failed":
                self._line(f"{run.name}: failed: {status.problem} (log: {log_file(run)})")
            case "finished" if not self._live:
                spent = "" if status.seconds is None else f" in {format_duration(status.seconds)}"
                self._line(", ".join(filter(None, [f"{run.name}: finished{spent}", results_text(status)])))
            case state if not self._live:
                self._line(f"{run.name}: {state}, step {of_total(status.step, status.steps)}")

    def stopping(self, names: Sequence[str]) -> None:
        self._line(f"stopping: {', '.join(names)} will save and end; a second Ctrl-C ends at once, without saving")

    def refresh(self, statuses: Mapping[str, RunStatus]) -> None:
        self._statuses = statuses
        if self._live or time.monotonic() - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        for status in statuses.values():
            if status.state == "running":
                loss = "" if status.loss is None else f"loss {status.loss:.4f}"
                left = "" if status.seconds_left is None else f"{format_duration(status.seconds_left)} left"
                step = "starting" if status.step is None else f"step {of_total(status.step, status.steps)}"
                progress = f"{status.name}: {step}"
                self._line(", ".join(filter(None, [progress, loss, results_text(status), left])))
        self._line(f"sweep: {self._summary()}")

    def _line(self, text: str) -> None:
        if self._live:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _summary(self) -> str:
        states = [status.state for status in self._statuses.values()]
        counts = [f"{states.count(state)} {state}" for state in STATES if state in states]
        left = seconds_left(self._statuses.values(), together=self._together)
        return ", ".join([*counts, *([] if left is None else [f"about {format_duration(left)} left"])])

    def _table(self) -> Table:
        """All runs, or those that matter most where a terminal is too low for all."""
        table = narrow_table(
            "run", "state", "epoch", "step", "loss", "EMA top-1", "weights top-1", "time left", text={"run", "state"}
        )
        room = max(3, self._console.height - _OTHER_LINES)
        shown = list(self._statuses.values())
        if len(shown) > room:
            shown = sorted(shown, key=lambda status: _BY_INTEREST.index(status.state))[:room]
        for status in shown:
            table.add_row(
                status.name,
                Text(status.state, style=COLORS[status.state]),
                of_total(status.epoch, status.epochs),
                of_total(status.step, status.steps),
                "-" if status.loss is None else f"{status.loss:.4f}",
                best_top1(status, EMA),
                best_top1(status, WEIGHTS),
                duration(status.seconds_left),
            )
        hidden = len(self._statuses) - len(shown)
        table.caption = self._summary() + (f"; {hidden} not shown" if hidden else "")
        table.caption_justify = "left"
        return table


def print_runs(runs: Sequence[SweepRun], statuses: Mapping[str, RunStatus], parameters: Mapping[str, int]) -> None:
    """The runs of a sweep before it starts.

    Args:
        parameters: of the model of each combination.
    """
    labels = list(runs[0].values)
    table = narrow_table("index", "run", *labels, "seed", "parameters", "state", text={"run", *labels, "state"})
    for index, run in enumerate(runs):
        values = [Text(value) for value in run.values.values()]
        count = f"{parameters[run.combination]:,}"
        table.add_row(str(index), run.name, *values, str(run.config.seed), count, statuses[run.name].state)
    print_table(table)


def print_results(results: Sequence[CombinationResult]) -> None:
    """The best top-1 of each combination: mean and sample standard deviation over its finished runs, in percent."""
    headings = [f"{label} {what}" for label in LABELS.values() for what in ("best top-1", "best - last")]
    table = narrow_table("runs", "finished", *headings, text={"runs"})
    for result in results:
        cells = [
            str(spread) if (spread := by_set.get(name)) else "-"
            for name in LABELS
            for by_set in (result.top1, result.gap)
        ]
        table.add_row(Text(result.combination), f"{result.finished}/{result.runs}", *cells)
    print_table(table)
