"""Results of a sweep by combination: mean and standard deviation over its finished runs."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scalevit.reports.sweeps.plan import SweepRun
from scalevit.runs.summary import EMA, WEIGHTS


@dataclass(frozen=True)
class Spread:
    """Of one number over runs."""

    mean: float
    deviation: float | None
    """The sample's standard deviation; None of a single run."""

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


@dataclass(frozen=True)
class CombinationResult:
    """Runs that differ in their seeds only."""

    combination: str
    finished: int
    runs: int
    top1: Mapping[str, Spread]
    """By weight set: of the best epochs, in percent. Without a weight set that a finished run does not have."""
    gap: Mapping[str, Spread]
    """By weight set: best minus last top-1."""


def combine(runs: Iterable[SweepRun]) -> list[CombinationResult]:
    """The result of each combination, in the order of the runs, from their summary.json."""
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(run.combination, []).append(run)
    return [_combine(combination, group) for combination, group in groups.items()]


def _combine(combination: str, runs: list[SweepRun]) -> CombinationResult:
    summaries = [summary for run in runs if (summary := _read_summary(run)) is not None]
    return CombinationResult(
        combination, len(summaries), len(runs), _spreads(summaries, "top1"), _spreads(summaries, "peak_to_final_gap")
    )


def _spreads(summaries: list[dict[str, Any]], key: str) -> dict[str, Spread]:
    """By weight set; without one that a summary does not have."""
    found = {}
    for weight_set in (EMA, WEIGHTS):
        sections = [summary if weight_set == WEIGHTS else summary.get(EMA) for summary in summaries]
        values = [section.get(key) if isinstance(section, dict) else None for section in sections]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if numbers and len(numbers) == len(values):
            found[weight_set] = Spread(fmean(numbers), stdev(numbers) if len(numbers) > 1 else None)
    return found


def _read_summary(run: SweepRun) -> dict[str, Any] | None:
    """None where the run is not finished, or the file is damaged."""
    try:
        summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) else None
