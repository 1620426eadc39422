"""The figures of a report, each with a table of its numbers: curves, gaps, throughput, parameters against accuracy.

Knows groups and charts. Must not know the page around them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scalevit.reports import svg
from scalevit.reports.groups import Group
from scalevit.reports.results import group_speed, why_missing
from scalevit.reports.runs import WEIGHT_SETS, Run, number
from scalevit.reports.statistics import Spread
from scalevit.reports.svg import Bar, Point, Series
from scalevit.reports.tables import MISSING, Cell, Column, Table, number_cell, spread_cell, text_cell
from scalevit.runs.summary import EMA, WEIGHTS, record_key

MOST_POINTS = 120
"""Points of a line; of more records every second, third and so on is drawn."""


@dataclass(frozen=True)
class Figure:
    """A chart with its title, legend and table."""

    identity: str
    title: str
    caption: str
    chart: str
    """As inline SVG."""
    legend: Sequence[tuple[str, int]]
    """Names and colours; empty where the chart has the names itself."""
    table: Table
    has_lines: bool = False


def figures_of(groups: Sequence[Group]) -> list[Figure]:
    """All figures that there are numbers for."""
    names = list(WEIGHT_SETS.items())
    curves: list[tuple[str, str, str, bool, str]] = [
        ("training-loss", "Training loss", "loss", False, "training loss"),
        *(
            (f"top1-{weight_set}", f"Top-1 of the {shown}", record_key(weight_set, "top1"), True, "top-1, %")
            for weight_set, shown in names
        ),
        *(
            (f"loss-{weight_set}", f"Validation loss of the {shown}", record_key(weight_set, "loss"), True, "loss")
            for weight_set, shown in names
        ),
        ("learning-rate", "Learning rate", "lr", False, "learning rate"),
    ]
    found = [_curves(groups, *curve) for curve in curves]
    found += [_gaps(groups, weight_set) for weight_set in WEIGHT_SETS]
    return [figure for figure in [*found, _throughput(groups), _cost(groups)] if figure is not None]


def _curves(
    groups: Sequence[Group], identity: str, title: str, key: str, evaluations: bool, y_label: str
) -> Figure | None:
    x_key = "epoch" if evaluations else "step"
    read = _reader(key, x_key, evaluations)
    series: list[Series] = []
    for color, group in enumerate(groups):
        shape = ".2f" if key.endswith("top1") else ".4g"
        mean = _mean_curve(group, read, x_key, shape)
        if any(point.y is not None for point in mean):
            series.append(Series(group.label, color, mean))
        for run in group.runs:
            points = [Point(x, y, None, _told(run.name, x_key, x, y, shape)) for x, y in _thinned(read(run))]
            if run.state != "finished" and any(point.y is not None for point in points):
                series.append(Series(f"{run.name} ({run.state})", color, points, is_faint=True))
    if not series:
        return None
    several = any(len(group.counted) > 1 for group in groups)
    caption = "Mean over seeds, with a band of one standard deviation. " if several else ""
    if any(one.is_faint for one in series):
        caption += "Thin lines: runs that are not finished."
    return Figure(
        identity,
        title,
        caption.strip(),
        svg.line_chart(identity, _described(title, x_key, series), series, x_key, y_label),
        [(one.label, one.color) for one in series if not one.is_faint]
        or list({one.label: one.color for one in series}.items()),
        _curve_table(identity, title, series, x_key),
        has_lines=True,
    )


_Curve = list[tuple[float, float | None]]


def _reader(key: str, x_key: str, evaluations: bool) -> Callable[[Run], _Curve]:
    """What reads a run's curve: x and the value, which is None where it is not finite."""

    def read(run: Run) -> _Curve:
        records: Sequence[Mapping[str, Any]] = run.evaluations if evaluations else run.training
        placed = [(number(record, x_key), number(record, key)) for record in records if key in record]
        return [(x, y) for x, y in placed if x is not None]

    return read


def _mean_curve(group: Group, read: Callable[[Run], _Curve], x_key: str, shape: str) -> list[Point]:
    """Where every counted run has a record; None where one of them has no finite number."""
    curves = [dict(read(run)) for run in group.counted]
    if not curves:
        return []
    shared = [x for x in curves[0] if all(x in curve for curve in curves)]
    points = []
    for x, _ in _thinned([(x, None) for x in sorted(shared)]):
        values = [curve[x] for curve in curves]
        known = [value for value in values if value is not None]
        spread = Spread.of(known) if len(known) == len(values) else None
        mean, std = (None, None) if spread is None else (spread.mean, spread.std)
        points.append(Point(x, mean, std, _told(group.label, x_key, x, mean, shape, std, len(values))))
    return points


def _thinned(curve: _Curve) -> _Curve:
    """At most MOST_POINTS of them, evenly spread, with the last."""
    every = -(-len(curve) // MOST_POINTS)
    return [point for index, point in enumerate(reversed(curve)) if index % every == 0][::-1] if curve else []


def _told(
    label: str, x_key: str, x: float, y: float | None, shape: str, std: float | None = None, seeds: int = 1
) -> str:
    """For example "grouped, step 120: 1.234 ± 0.012 (3 seeds)"."""
    value = MISSING if y is None else format(y, shape)
    spread = "" if std is None else f" ± {format(std, shape)}"
    of = "" if std is None else f" ({seeds} seeds)"
    return f"{label}, {x_key} {x:g}: {value}{spread}{of}"


def _described(title: str, x_key: str, series: Sequence[Series]) -> str:
    """For those who cannot see the chart: the last value of every line."""
    ends = [next((point.title for point in reversed(one.points) if point.y is not None), "") for one in series]
    return f"{title} by {x_key}. Last values: {'; '.join(ends)}. The table below has the numbers."


def _curve_table(identity: str, title: str, series: Sequence[Series], x_key: str) -> Table:
    by_x = [{point.x: point for point in one.points} for one in series]
    columns = [
        Column(x_key, x_key),
        *(Column(f"series_{index}", one.label, has_std=True) for index, one in enumerate(series)),
    ]
    rows = []
    for x in sorted({x for points in by_x for x in points}):
        cells = [_point_cell(points.get(x)) for points in by_x]
        rows.append([Cell(f"{x:,g}", x), *cells])
    return Table(identity, f"{title}: numbers", columns, rows)


def _point_cell(point: Point | None) -> Cell:
    if point is None or point.y is None:
        return Cell(MISSING)
    return spread_cell(Spread(point.y, point.std, 1), ".4g", "")


def _gaps(groups: Sequence[Group], weight_set: str) -> Figure | None:
    rows = [(group.label, group.spread(weight_set, "gap"), why_missing(group, weight_set)) for group in groups]
    title = f"Peak-to-final gap of the {WEIGHT_SETS[weight_set]}"
    return _bars(f"gap-{weight_set}", title, "Best minus last top-1.", rows, ".2f", "percentage points")


def _throughput(groups: Sequence[Group]) -> Figure | None:
    rows = [(group.label, group_speed(group), "not recorded") for group in groups]
    caption = "Training steps of finished runs, as the runs have measured it, beside whatever else the machine did."
    return _bars("throughput", "Throughput", caption, rows, ",.4g", "images per second")


def _bars(
    identity: str, title: str, caption: str, rows: Sequence[tuple[str, Spread | None, str]], shape: str, x_label: str
) -> Figure | None:
    if all(spread is None for _, spread, _ in rows):
        return None
    bars, table = [], []
    for color, (label, spread, reason) in enumerate(rows):
        cell = spread_cell(spread, shape, reason)
        value, std = (None, None) if spread is None else (spread.mean, spread.std)
        bars.append(Bar(label, color, value, std, f"{MISSING} ({reason})" if spread is None else cell.text))
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
            series.append(Series(group.label, color, [Point(parameters, spread.mean, spread.std, title)]))
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
        svg.scatter_chart("cost", described, series, "parameters", "last top-1, %"),
        [(one.label, one.color) for one in series],
        Table("cost", f"{title}: numbers", columns, rows),
    )
