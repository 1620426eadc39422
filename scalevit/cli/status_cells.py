"""Cells of tables about runs: progress, best results, times. Knows the status of a run; reads no files."""

from scalevit.runs.status import RunStatus
from scalevit.runs.summary import EMA, WEIGHTS
from scalevit.terminal import format_duration

LABELS = {EMA: "EMA", WEIGHTS: "weights"}
COLORS = {"running": "cyan", "finished": "green", "interrupted": "yellow", "failed": "red", "not started": "dim"}
"""Of states on a terminal."""


def of_total(done: int | None, total: int | None) -> str:
    """For example "120/1,150"; "-" where nothing is known."""
    if done is None:
        return "-" if total is None else f"0/{total:,}"
    return f"{done:,}" if total is None else f"{done:,}/{total:,}"


def best_top1(status: RunStatus, weight_set: str) -> str:
    """With its epoch: "97.22 (40)"."""
    best = status.best.get(weight_set)
    if best is None:
        return "-"
    return f"{best.top1:.2f}" + ("" if best.epoch is None else f" ({best.epoch})")


def duration(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds)


def age(seconds: float) -> str:
    """One unit: "12 s", "3 min", "5 h", "4 d"."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def results_text(status: RunStatus) -> str:
    """For example "best top-1 97.22 % (EMA), 96.94 % (weights)"; "" before any evaluation."""
    known = [f"{status.best[name].top1:.2f} % ({label})" for name, label in LABELS.items() if name in status.best]
    return f"best top-1 {', '.join(known)}" if known else ""
