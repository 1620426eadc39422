"""A report as one HTML page, which opens offline: style, script and figures are in it, and nothing is requested.

Knows tables, figures and the main numbers of groups. Must not know runs' files. Texts are escaped here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from urllib.parse import quote

from scalevit.reports.curves import Figure
from scalevit.reports.groups import Group
from scalevit.reports.results import main_result
from scalevit.reports.svg import legend_mark
from scalevit.reports.tables import Cell, Column, Table

GENERATOR = "scalevit report"
"""Marks a page as ours, in its first lines."""
# Forbids every request, whatever a run's name may hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def to_html(
    title: str,
    lead: str,
    origin: str,
    groups: Sequence[Group],
    baseline: Group | None,
    tables: Sequence[Table],
    figures: Sequence[Figure],
) -> str:
    """A whole document.

    Args:
        title: its heading.
        lead: its first paragraph.
        origin: command and date, at its end.
        groups: whose main results are shown first.
        baseline: what these are compared with.
        tables: each a section; the figures come after the first ones.
        figures: with their tables.
    """
    results, rest = tables[:3], tables[3:]
    return document(
        title,
        lead,
        origin,
        [
            Section("overview", "Overview", _cards(groups, baseline)),
            *map(table_section, results),
            Section("figures", "Figures", figures_html(figures)),
            *map(table_section, rest),
        ],
    )


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading."""

    identity: str
    title: str
    content: str
    """HTML."""


def document(title: str, lead: str, origin: str, sections: Sequence[Section]) -> str:
    """A page with this package's style and script. Texts are plain."""
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    links = "".join(f'<li><a href="#{one.identity}">{escape(one.title)}</a></li>' for one in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{GENERATOR}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>{''.join(map(_section, sections))}</main>\n<footer><p>{escape(origin)}</p></footer>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _section(one: Section) -> str:
    heading = f'<h2 id="{one.identity}-h">{escape(one.title)}</h2>'
    return f'<section id="{one.identity}" aria-labelledby="{one.identity}-h">{heading}{one.content}</section>'


def _asset(name: str) -> str:
    return (files("scalevit.reports") / name).read_text(encoding="utf-8")


def _cards(groups: Sequence[Group], baseline: Group | None) -> str:
    """The main number of each group, large."""
    results = [main_result(group, baseline) for group in groups]
    if not results:
        return "<p>No group of runs.</p>"
    return cards_html(
        [
            (group.label, result.value, [result.what, *result.lines])
            for group, result in zip(groups, results, strict=True)
        ],
        marked=True,
    )


def cards_html(cards: Sequence[tuple[str, str, Sequence[str]]], *, marked: bool = False) -> str:
    """Boxes with a large number each.

    Args:
        cards: heading, number, and lines below it.
        marked: with the colours and shapes of the figures, in their order.
    """
    parts = []
    for color, (heading, value, lines) in enumerate(cards):
        mark = legend_mark(color, line=False) if marked else ""
        below = "".join(f'<p class="small">{escape(line)}</p>' for line in lines)
        parts.append(f'<li class="card"><h3>{mark}{escape(heading)}</h3><p class="big">{escape(value)}</p>{below}</li>')
    return f'<ul class="cards">{"".join(parts)}</ul>'


def table_section(table: Table) -> Section:
    """A table with its notes."""
    return Section(table.name, table.title, table_html(table) + _notes(table))


def figures_html(figures: Sequence[Figure]) -> str:
    """Figures side by side where there is room."""
    if not figures:
        return "<p>No run has recorded anything yet.</p>"
    return f'<div class="figures">{"".join(map(figure_html, figures))}</div>'


def figure_html(figure: Figure) -> str:
    """A chart with its title, legend, caption and table."""
    marks = "".join(
        f'<li data-series="{color}">{legend_mark(color, line=figure.has_lines)}{escape(name)}</li>'
        for name, color in figure.legend
    )
    legend = f'<ul class="legend">{marks}</ul>' if marks else ""
    caption = f'<p class="small">{escape(figure.caption)}</p>' if figure.caption else ""
    return (
        f'<figure id="{figure.identity}"><figcaption><h3>{escape(figure.title)}</h3>{legend}</figcaption>{figure.chart}'
        f'{caption}<details><summary>Numbers<span class="hidden"> of {escape(figure.title)}</span></summary>'
        f"{table_html(figure.table)}</details></figure>"
    )


def table_html(table: Table) -> str:
    """A table that scrolls in its own box where it is wide; nothing where it has no rows."""
    if not table.rows:
        return ""
    head = "".join(f'<th scope="col"{_kind(column)}>{_heading(column)}</th>' for column in table.columns)
    rows = "".join(f"<tr>{_row(row, table.columns)}</tr>" for row in table.rows)
    label = escape(table.title)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {label}">'
        f'<table><caption class="hidden">{label}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(row: Sequence[Cell], columns: Sequence[Column]) -> str:
    return "".join(
        _cell(cell, column, index == 0) for index, (cell, column) in enumerate(zip(row, columns, strict=True))
    )


def _cell(cell: Cell, column: Column, is_heading: bool) -> str:
    tag, scope = ("th", ' scope="row"') if is_heading else ("td", "")
    sorted_by = f' data-value="{cell.value!r}"' if isinstance(cell.value, int | float) else ""
    text = escape(cell.text)
    if cell.link is not None:
        text = f'<a href="{escape(quote(cell.link.as_posix()))}">{text}</a>'
    reason = f' title="{escape(cell.reason)}"' if cell.reason else ""
    return f"<{tag}{scope}{_kind(column)}{sorted_by}{reason}>{text}</{tag}>"


def _heading(column: Column) -> str:
    return escape(column.title.replace("top-", "top\u2011"))  # a hyphen that no line ends with


def _kind(column: Column) -> str:
    return "" if column.is_text else ' class="number"'


def _notes(table: Table) -> str:
    if not table.all_notes:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in table.all_notes)}</ul>'
