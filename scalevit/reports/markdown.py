"""The tables of a report as Markdown. Knows tables only."""

import re
from collections.abc import Sequence
from urllib.parse import quote

from scalevit.reports.tables import Cell, Table


def to_markdown(title: str, lead: str, origin: str, tables: Sequence[Table]) -> str:
    """A whole document.

    Args:
        title: its heading.
        lead: its first paragraph.
        origin: its last one.
        tables: each under a heading of its own.
    """
    parts = [f"# {_plain(title)}", lead, *(_section(table) for table in tables), _plain(origin)]
    return "\n\n".join(parts) + "\n"


def _section(table: Table) -> str:
    parts = [f"## {table.title}"]
    if table.rows:
        lines = [
            _row([_plain(column.title) for column in table.columns]),
            _row(["---" if column.is_text else "---:" for column in table.columns]),
            *(_row([_cell(cell) for cell in row]) for row in table.rows),
        ]
        parts.append("\n".join(lines))
    parts += ["\n".join(f"- {_plain(note)}" for note in table.all_notes)] if table.all_notes else []
    return "\n\n".join(parts)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    text = _plain(cell.text)
    return text if cell.link is None else f"[{text}]({quote(cell.link.as_posix())})"


def _plain(text: str) -> str:
    """With what Markdown or HTML would take for their own marks escaped."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
