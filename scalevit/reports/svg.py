"""Charts as inline SVG: lines with bands, bars, points. Colours come from the page's style sheet, by class.

Every point has its values as a title, which browsers show on hover. Knows numbers and labels. Must not know runs.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 18, 12, 50
COLORS = 8
"""Number of series with different colours and shapes, as in page.css."""


@dataclass(frozen=True)
class Point:
    """A value with its spread; None where there is no finite number."""

    x: float
    y: float | None
    std: float | None
    title: str
    """Shown on hover."""


@dataclass(frozen=True)
class Series:
    """A line, or a set of points."""

    label: str
    color: int
    """Index, of which COLORS are different."""
    points: Sequence[Point]
    is_faint: bool = False
    """Of a run that is not finished."""

    @property
    def style(self) -> str:
        """Its classes."""
        return f"s{self.color % COLORS}" + (" faint" if self.is_faint else "")


@dataclass(frozen=True)
class Bar:
    """One bar of a bar chart."""

    label: str
    color: int
    value: float | None
    std: float | None
    text: str
    """The value as it is shown, or why there is none."""


def line_chart(identity: str, description: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Lines with bands of one standard deviation; a missing value breaks its line."""
    points = [point for line in series for point in line.points]
    frame = _Frame(points, from_zero=False)
    parts = [*frame.axes(x_label, y_label)]
    for line in series:
        for piece in _pieces(line.points):
            parts += _line(frame, line, piece)
    for line in series:
        radius = 2.5 if len(line.points) <= 30 else 0
        parts += [_marker(frame, line, point, radius) for point in line.points if point.y is not None]
    return _whole(identity, description, HEIGHT, parts)


def scatter_chart(identity: str, description: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Points with whiskers of one standard deviation, each series in its own shape."""
    frame = _Frame([point for one in series for point in one.points], from_zero=False, pad_x=True)
    parts = [*frame.axes(x_label, y_label)]
    for one in series:
        for point in one.points:
            if point.y is None:
                continue
            x, y = frame.x(point.x), frame.y(point.y)
            if point.std:
                low, high = frame.y(point.y - point.std), frame.y(point.y + point.std)
                parts.append(f'<path class="{one.style} whisker" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
            mark = shape(one.color, x, y, 6)
            parts.append(f'<g class="{one.style} mark hit">{mark}<title>{escape(point.title)}</title></g>')
    return _whole(identity, description, HEIGHT, parts)


def bar_chart(identity: str, description: str, bars: Sequence[Bar], x_label: str) -> str:
    """Horizontal bars with whiskers of one standard deviation, each under its label; from zero."""
    step, top = 44, 8
    height = top + step * len(bars) + 46
    ends = [bar.value + sign * (bar.std or 0) for bar in bars if bar.value is not None for sign in (-1, 1)]
    ticks = ticks_between(min([0.0, *ends]), max([0.0, *ends]), 5) if any(ends) else [0.0, 1.0]
    left, right = 12, WIDTH - 20
    low, high = min([ticks[0], *ends]), max([ticks[-1], *ends])

    def place(value: float) -> float:
        return left + (value - low) / ((high - low) or 1) * (right - left)

    bottom = top + step * len(bars) + 2
    parts = []
    for tick in ticks:
        x = place(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick_text(tick)}</text>')
    for index, bar in enumerate(bars):
        parts += _bar(bar, top + step * index, place)
    parts.append(f'<path class="axis" d="M{place(0):.1f} {top}V{bottom}"/>')
    middle = (left + right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    return _whole(identity, description, height, parts)


def _bar(bar: Bar, top: float, place: Callable[[float], float]) -> list[str]:
    parts = [
        f'<text class="name" x="18" y="{top + 15}">{escape(bar.label)}</text>',
        f'<text class="value" x="{WIDTH - 20}" y="{top + 15}" text-anchor="end">{escape(bar.text)}</text>',
    ]
    if bar.value is None:
        return parts
    start, end = sorted((place(0), place(bar.value)))
    rect = f'<rect x="{start:.1f}" y="{top + 21}" width="{max(end - start, 1):.1f}" height="15" rx="2"/>'
    title = escape(f"{bar.label}: {bar.text}")
    parts.append(f'<g class="s{bar.color % COLORS} bar hit">{rect}<title>{title}</title></g>')
    if bar.std:
        low, high = place(bar.value - bar.std), place(bar.value + bar.std)
        y = top + 28.5
        ends = f"M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8"
        parts.append(f'<path class="whisker ink" d="M{low:.1f} {y}H{high:.1f}{ends}"/>')
    return parts


def legend_mark(color: int, *, line: bool) -> str:
    """The small drawing beside a name in a legend."""
    stroke = '<path class="line" d="M1 7H27"/>' if line else ""
    mark = "" if line else shape(color, 14, 7, 5)
    return (
        f'<svg class="s{color % COLORS} key" viewBox="0 0 28 14" width="28" height="14" aria-hidden="true">'
        f'{stroke}<g class="mark">{mark}</g></svg>'
    )


def shape(color: int, x: float, y: float, size: float) -> str:
    """Circle, square, triangle or diamond, so that series differ without their colours."""
    kind = color % 4
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    if kind == 1:
        return f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"/>'
    corners = [(0, -1.2), (1.15, 0.9), (-1.15, 0.9)] if kind == 2 else [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)]
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}"/>'


def ticks_between(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from below `low` to above `high`, about `count` of them."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_text(value: float) -> str:
    """For example 0.002, 1e-5, 12,000, 1.5 M."""
    size = abs(value)
    if size < 1e-15:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:g} M".replace("-", "−")
    if size < 1e-3:
        mantissa, exponent = f"{value:.6e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{value:,.6g}".replace("-", "−")


class _Frame:
    """Scales and axes of a chart."""

    def __init__(self, points: Sequence[Point], *, from_zero: bool, pad_x: bool = False):
        xs = [point.x for point in points] or [0.0, 1.0]
        ys = [p.y + sign * (p.std or 0) for p in points if p.y is not None for sign in (-1, 1)] or [0.0, 1.0]
        self.y_ticks = ticks_between(0.0 if from_zero else min(ys), max(ys), 5)
        margin = (max(xs) - min(xs)) * 0.08 if pad_x else 0.0
        self.x_ticks = ticks_between(min(xs) - margin, max(xs) + margin, 5)
        # Lines use the whole width: only ticks inside the data are shown.
        self._x0, self._x1 = (self.x_ticks[0], self.x_ticks[-1]) if pad_x or min(xs) == max(xs) else (min(xs), max(xs))
        self._y0, self._y1 = self.y_ticks[0], self.y_ticks[-1]

    def x(self, value: float) -> float:
        return _LEFT + (value - self._x0) / (self._x1 - self._x0) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self._y0) / (self._y1 - self._y0) * (HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_label: str, y_label: str) -> Iterable[str]:
        """Grid, ticks and labels."""
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        for tick in self.y_ticks:
            y = self.y(tick)
            yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>'
            yield f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick_text(tick)}</text>'
        for tick in self.x_ticks:
            if self._x0 - 1e-9 <= tick <= self._x1 * (1 + 1e-9):
                x = self.x(tick)
                yield f'<path class="axis" d="M{x:.1f} {bottom}v4"/>'
                yield f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick_text(tick)}</text>'
        yield f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>'
        middle = (_LEFT + right) / 2
        yield f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
        turned = f'x="{-(_TOP + bottom) / 2:.0f}" y="14" transform="rotate(-90)"'
        yield f'<text class="label" {turned} text-anchor="middle">{escape(y_label)}</text>'


def _pieces(points: Sequence[Point]) -> list[list[Point]]:
    """Runs of points with values."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if point.y is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    return [piece for piece in pieces if piece]


def _line(frame: _Frame, line: Series, piece: Sequence[Point]) -> list[str]:
    upper = [(frame.x(p.x), frame.y((p.y or 0.0) + (p.std or 0.0))) for p in piece]
    lower = [(frame.x(p.x), frame.y((p.y or 0.0) - (p.std or 0.0))) for p in piece]
    parts = []
    if any(point.std for point in piece):
        parts.append(f'<path class="{line.style} band" d="{_path([*upper, *reversed(lower)])}Z"/>')
    middle = [(frame.x(p.x), frame.y(p.y or 0.0)) for p in piece]
    parts.append(f'<path class="{line.style} line" d="{_path(middle)}"/>')
    return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _marker(frame: _Frame, line: Series, point: Point, radius: float) -> str:
    """A point, with a larger invisible one around it for the pointer."""
    place = f'cx="{frame.x(point.x):.1f}" cy="{frame.y(point.y or 0.0):.1f}"'
    seen = f'<circle {place} r="{radius}"/>' if radius else ""
    return (
        f'<g class="{line.style} mark hit">{seen}<circle class="reach" {place} r="7"/>'
        f"<title>{escape(point.title)}</title></g>"
    )


def _whole(identity: str, description: str, height: float, parts: Iterable[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{identity}-d">'
        f'<desc id="{identity}-d">{escape(description)}</desc>{"".join(parts)}</svg>'
    )


def matrix_chart(
    identity: str,
    description: str,
    names: Sequence[str],
    counts: Sequence[Sequence[int]],
    row_label: str,
    column_label: str,
) -> str:
    """A square of counts, darker for a larger share of its row.

    Args:
        names: of rows and columns.
        counts: by row and column.
        row_label: what rows are.
        column_label: what columns are.
    """
    size = (WIDTH - _LEFT - _RIGHT) / len(names)
    top, turns = 12, len(names) > 12 or max(map(len, names)) > 3
    room = 84 if turns else 50
    parts = []
    for row, (name, line) in enumerate(zip(names, counts, strict=True)):
        y, total = top + row * size, sum(line) or 1
        short = escape(name if len(name) <= 8 else f"{name[:7]}…")
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + size / 2 + 4:.1f}" text-anchor="end">{short}</text>')
        x = _LEFT + row * size + size / 2
        bottom = top + len(names) * size
        turned = f'transform="rotate(-90 {x:.1f} {bottom + 6:.1f})"' if turns else ""
        place = 'text-anchor="end" dy="4"' if turns else 'text-anchor="middle" dy="10"'
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 6:.1f}" {place} {turned}>{short}</text>')
        for column, count in enumerate(line):
            parts.append(_matrix_cell(name, names[column], count, count / total, (_LEFT + column * size, y, size)))
    height = top + len(names) * size + room
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{height - 8}" text-anchor="middle">{escape(column_label)}</text>'
    )
    turned = f'x="{-(height - room) / 2:.0f}" y="12" transform="rotate(-90)"'
    parts.append(f'<text class="label" {turned} text-anchor="middle">{escape(row_label)}</text>')
    return _whole(identity, description, height, parts)


def _matrix_cell(name: str, other: str, count: int, share: float, place: tuple[float, float, float]) -> str:
    x, y, size = place
    kind = "s0" if name == other else "s1"
    title = escape(f"{name} as {other}: {count} ({share:.0%})")
    return (
        f'<g class="{kind} cell hit"><rect x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{size - 1:.1f}" '
        f'height="{size - 1:.1f}" style="fill-opacity:{0.04 + 0.96 * share:.2f}"/><title>{title}</title></g>'
    )
