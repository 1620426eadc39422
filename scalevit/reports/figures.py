"""The figures of a report, each with a table of its numbers: curves, gaps, throughput, parameters against accuracy.

Knows groups and charts. Must not know the page around them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scalevit.reports import svg
from scalevit.reports.curves import Figure, Points, line_figure, thinned, told
from scalevit.reports.groups import Group, spread_of
from scalevit.reports.results import group_speed, speed_cell, why_missing
from scalevit.reports.runs import WEIGHT_SETS, Run
from scalevit.reports.statistics import Spread
from scalevit.reports.svg import Bar, Point, Series
from scalevit.reports.tables import MISSING, Cell, Column, Table, number_cell, spread_cell, text_cell
from scalevit.runs.records import number
from scalevit.runs.summary import EMA, WEIGHTS, record_key


@dataclass(frozen=True)
class _Curve:
    """A figure of curves: a key of training or evaluation records."""

    identity: str
    title: str
    key: str
    y_label: str
    of_evaluations: bool = True
    second_half: bool = False
    """Only the epochs after half of the longest run, where groups differ by little."""

    @property
    def x_key(self) -> str:
        return "epoch" if self.of_evaluations else "step"

    @property
    def shape(self) -> str:
        return ".2f" if self.key.endswith("top1") else ".4g"

    def read(self, run: Run) -> Points:
        """A run's x and value, which is None where it is not finite."""
        records: Sequence[Mapping[str, Any]] = run.evaluations if self.of_evaluations else run.training
        placed = [
            (number(record.get(self.x_key)), number(record.get(self.key))) for record in records if self.key in record
        ]
        return [(x, y) for x, y in placed if x is not None]


def _curve_figures() -> list[_Curve]:
    found = [_Curve("training-loss", "Training loss", "loss", "training loss", of_evaluations=False)]
    for weight_set, shown in WEIGHT_SETS.items():
        title, key = f"Top-1 of the {shown}", record_key(weight_set, "top1")
        found.append(_Curve(f"top1-{weight_set}", title, key, "top-1, %"))
        found.append(_Curve(f"top1-{weight_set}-late", f"{title}, second half", key, "top-1, %", second_half=True))
    for weight_set, shown in WEIGHT_SETS.items():
        key = record_key(weight_set, "loss")
        found.append(_Curve(f"loss-{weight_set}", f"Validation loss of the {shown}", key, "loss"))
    return [*found, _Curve("learning-rate", "Learning rate", "lr", "learning rate", of_evaluations=False)]


def figures_of(groups: Sequence[Group]) -> list[Figure]:
    """All figures that there are numbers for."""
    found = [_curves(groups, curve) for curve in _curve_figures()]
    found += [_gaps(groups, weight_set) for weight_set in WEIGHT_SETS]
    return [figure for figure in [*found, _throughput(groups), _cost(groups)] if figure is not None]


def _curves(groups: Sequence[Group], curve: _Curve) -> Figure | None:
    runs = [run for group in groups for run in group.runs]
    last = max((x for run in runs for x, _ in curve.read(run)), default=0.0)
    first = last / 2 if curve.second_half else -1.0
    series: list[Series] = []
    for color, group in enumerate(groups):
        mean = _mean_curve(group, curve, first)
        if any(point.y is not None for point in mean):
            series.append(Series(group.label, color, mean))
        for run in group.runs:
            if run.state != "finished":
                points = [
                    Point(x, y, None, told(run.name, curve.x_key, x, y, curve.shape))
                    for x, y in thinned(curve.read(run))
                    if x > first
                ]
                if any(point.y is not None for point in points):
                    series.append(Series(f"{run.name} ({run.state})", color, points, is_faint=True))
    if not series:
        return None
    several = any(len(group.counted) > 1 for group in groups)
    caption = "Mean over seeds, with a band of one standard deviation. " if several else ""
    if any(one.is_faint for one in series):
        caption += "Thin lines: runs that are not finished."
    return line_figure(curve.identity, curve.title, caption.strip(), series, curve.x_key, curve.y_label)


def _mean_curve(group: Group, curve: _Curve, first: float) -> list[Point]:
    """Where every counted run has a record; None where one of them has no finite number."""
    own = [dict(curve.read(run)) for run in group.counted]
    if not own:
        return []
    shared = [x for x in sorted(own[0]) if x > first and all(x in values for values in own)]
    points = []
    for x, _ in thinned([(x, None) for x in shared]):
        spread = spread_of([values[x] for values in own])
        mean, std = (None, None) if spread is None else (spread.mean, spread.std)
        points.append(Point(x, mean, std, told(group.label, curve.x_key, x, mean, curve.shape, std, len(own))))
    return points


def _gaps(groups: Sequence[Group], weight_set: str) -> Figure | None:
    rows = []
    for group in groups:
        spread = group.spread(weight_set, "gap")
        rows.append((group.label, spread, spread_cell(spread, ".2f", why_missing(group, weight_set))))
    title = f"Peak-to-final gap of the {WEIGHT_SETS[weight_set]}"
    return _bars(f"gap-{weight_set}", title, "Best minus last top-1.", rows, "percentage points")


def _throughput(groups: Sequence[Group]) -> Figure | None:
    rows = [(group.label, group_speed(group), speed_cell(group)) for group in groups]
    caption = "Training steps of finished runs, as the runs have measured it, beside whatever else the machine did."
    return _bars("throughput", "Throughput", caption, rows, "images per second")


def _bars(
    identity: str, title: str, caption: str, rows: Sequence[tuple[str, Spread | None, Cell]], x_label: str
) -> Figure | None:
    if all(spread is None for _, spread, _ in rows):
        return None
    bars, table = [], []
    for color, (label, spread, cell) in enumerate(rows):
        value, std = (None, None) if spread is None else (spread.mean, spread.std)
        bars.append(Bar(label, color, value, std, f"{MISSING} ({cell.reason})" if spread is None else cell.text))
        table.append([text_cell(label), cell])
    description = f"{title}: {'; '.join(f'{bar.label} {bar.text}' for bar in bars)}, in {x_label}."
    columns = [Column("group", "group", is_text=True), Column("value", x_label, has_std=True)]
    if any(spread and spread.std for _, spread, _ in rows):
        caption += " Whiskers: one standard deviation over seeds."
    chart = svg.bar_chart(identity, description, bars, x_label)
    return Figure(identity, title, caption, chart, [], Table(identity, f"{title}: numbers", columns, table))


def _cost(groups: Sequence[Group]) -> Figure | None:
    """Parameters against the last top-1 of the EMA, or of the weights where no group has an EMA."""
    weight_set = EMA if any(group.spread(EMA, "final_top1") for group in groups) else WEIGHTS
    shown = WEIGHT_SETS[weight_set]
    series, rows = [], []
    for color, group in enumerate(groups):
        spread, counts = group.spread(weight_set, "final_top1"), {run.of_summary("parameters") for run in group.counted}
        parameters = next(iter(counts)) if len(counts) == 1 else None
        cell = spread_cell(spread, ".2f", why_missing(group, weight_set))
        rows.append([text_cell(group.label), number_cell(parameters, ",", "not recorded"), cell])
        if spread is not None and parameters is not None:
            title = f"{group.label}: {parameters:,} parameters, last top-1 {cell.text} %"
            series.append(Series(group.label, color, [Point(parameters / 1e6, spread.mean, spread.std, title)]))
    if not series:
        return None
    title = "Parameters against accuracy"
    described = f"{title} of the {shown}. {'; '.join(one.points[0].title for one in series)}."
    columns = [
        Column("group", "group", is_text=True),
        Column("parameters", "parameters"),
        Column("last_top1", f"last top-1 of the {shown}, %", has_std=True),
    ]
    return Figure(
        "cost",
        title,
        f"Last top-1 of the {shown}. Whiskers: one standard deviation over seeds.",
        svg.scatter_chart("cost", described, series, "parameters, millions", "last top-1, %"),
        [(one.label, one.color) for one in series],
        Table("cost", f"{title}: numbers", columns, rows),
    )
