"""A report as one HTML page, which opens offline: style, script and figures are in it, and nothing is requested.

Knows tables, figures and the main numbers of groups. Must not know runs' files. Texts are escaped here.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from urllib.parse import quote

from scalevit.reports.figures import Figure
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
    sections = [
        *map(_table_section, results),
        _section("figures", "Figures", _figures(figures)),
        *map(_table_section, rest),
    ]
    named = [(table.name, table.title) for table in results]
    named += [("figures", "Figures"), *((table.name, table.title) for table in rest)]
    links = "".join(f'<li><a href="#{identity}">{escape(shown)}</a></li>' for identity, shown in named)
    return document(
        title,
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"<main>{_cards(groups, baseline)}{''.join(sections)}</main>"
        f"<footer><p>{escape(origin)}</p></footer>",
    )


def document(title: str, body: str) -> str:
    """A page with this package's style and script.

    Args:
        title: plain text.
        body: HTML.
    """
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{GENERATOR}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return (files("scalevit.reports") / name).read_text(encoding="utf-8")


def _cards(groups: Sequence[Group], baseline: Group | None) -> str:
    """The main number of each group, large."""
    cards = []
    for color, group in enumerate(groups):
        result = main_result(group, baseline)
        cards.append(
            f'<li class="card"><h3>{legend_mark(color, line=False)}{escape(group.label)}</h3>'
            f'<p class="big">{escape(result.value)}</p><p>{escape(result.what)}</p>'
            + "".join(f'<p class="small">{escape(line)}</p>' for line in result.lines)
            + "</li>"
        )
    shown = f'<ul class="cards">{"".join(cards)}</ul>' if cards else "<p>No group of runs.</p>"
    return _section("overview", "Overview", shown)


def _section(identity: str, title: str, content: str) -> str:
    heading = f'<h2 id="{identity}-h">{escape(title)}</h2>'
    return f'<section id="{identity}" aria-labelledby="{identity}-h">{heading}{content}</section>'


def _table_section(table: Table) -> str:
    return _section(table.name, table.title, table_html(table) + _notes(table))


def _figures(figures: Sequence[Figure]) -> str:
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
