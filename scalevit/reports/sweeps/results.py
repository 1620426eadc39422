"""Results of a sweep by combination: mean and standard deviation over its finished runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scalevit.reports.statistics import Spread, spread_of
from scalevit.reports.sweeps.plan import SweepRun
from scalevit.runs.records import number, read_object, section
from scalevit.runs.summary import EMA, WEIGHTS


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
    found = [read_object(run.folder / "summary.json")[0] for run in runs]
    summaries = [summary for summary in found if summary]
    return CombinationResult(
        combination, len(summaries), len(runs), _spreads(summaries, "top1"), _spreads(summaries, "peak_to_final_gap")
    )


def _spreads(summaries: list[dict[str, Any]], key: str) -> dict[str, Spread]:
    """By weight set; without one that a summary does not have."""
    found = {}
    for weight_set in (EMA, WEIGHTS):
        sections = [summary if weight_set == WEIGHTS else section(summary, EMA) for summary in summaries]
        if spread := spread_of([number(own.get(key)) for own in sections]):
            found[weight_set] = spread
    return found
