"""A figure of lines with its legend, its description and the table of its numbers.

Knows series of points. Must not know runs or groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scalevit.reports import svg
from scalevit.reports.statistics import Spread
from scalevit.reports.svg import Point, Series
from scalevit.reports.tables import MISSING, Cell, Column, Table, spread_cell

MOST_POINTS = 120
"""Points of a line; of more records every second, third and so on is drawn."""
Points = list[tuple[float, float | None]]
"""x and value; None where it is not finite."""


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


def line_figure(identity: str, title: str, caption: str, series: Sequence[Series], x_key: str, y_label: str) -> Figure:
    """Lines over steps or epochs.

    Args:
        identity: unique on its page.
        title: of the figure.
        caption: what a reader must know; may be empty.
        series: at least one, with a value.
        x_key: "step" or "epoch".
        y_label: with its unit.
    """
    ends = [next((point.title for point in reversed(one.points) if point.y is not None), "") for one in series]
    described = f"{title} by {x_key}. Last values: {'; '.join(ends)}. The table below has the numbers."
    chart = svg.line_chart(identity, described, series, x_key, y_label)
    legend = [] if [one.label for one in series] == [title] else _legend(series)
    return Figure(identity, title, caption, chart, legend, _table(identity, title, series, x_key), has_lines=True)


def _legend(series: Sequence[Series]) -> list[tuple[str, int]]:
    """Of the groups; of single runs where no group has a mean."""
    means = [one for one in series if not one.is_faint]
    return [(one.label, one.color) for one in means or series]


def thinned(points: Points) -> Points:
    """At most MOST_POINTS of them, evenly spread, with the last."""
    every = max(1, -(-len(points) // MOST_POINTS))
    return points[::-1][::every][::-1]


def told(
    label: str, x_key: str, x: float, y: float | None, shape: str, std: float | None = None, seeds: int = 1
) -> str:
    """What a point shows on hover, for example "grouped, step 120: 1.234 ± 0.012 (3 seeds)".

    Args:
        shape: format of the value.
        std: over seeds.
    """
    value = MISSING if y is None else format(y, shape)
    spread = "" if std is None else f" ± {format(std, shape)} ({seeds} seeds)"
    return f"{label}, {x_key} {x:g}: {value}{spread}"


def _table(identity: str, title: str, series: Sequence[Series], x_key: str) -> Table:
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
