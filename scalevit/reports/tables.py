"""Tables as rows of cells. A number that does not exist is "–", with its reason in a note.

Knows numbers and texts. Must not know runs, or how a table is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scalevit.reports.statistics import Spread

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One value of a table."""

    text: str
    """As it is shown."""
    value: float | str | None = None
    """Unrounded, for CSV and for sorting."""
    std: float | None = None
    """Of a mean over seeds."""
    link: Path | None = None
    """A file, relative to the report."""
    reason: str = ""
    """Why there is no value."""


@dataclass(frozen=True)
class Column:
    """A heading."""

    key: str
    """In CSV; units at its end."""
    title: str
    is_text: bool = False
    has_std: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings, and notes below."""

    name: str
    """Of its CSV file."""
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()

    @property
    def all_notes(self) -> list[str]:
        """With the reasons of missing values, each once."""
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            for column, cell in zip(self.columns, row, strict=True):
                if cell.reason:
                    reasons.setdefault(cell.reason, []).append(f"{row[0].text}, {column.title}")
        return [*self.notes, *(f"{MISSING} {where[0]}{_more(where)}: {why}" for why, where in reasons.items())]


def _more(where: Sequence[str]) -> str:
    return f" and {len(where) - 1} more" if len(where) > 1 else ""


def text_cell(text: str, link: Path | None = None) -> Cell:
    return Cell(text, text, link=link)


def number_cell(value: float | None, shape: str, reason: str) -> Cell:
    """A number by its format, or a missing one with its reason."""
    return Cell(MISSING, reason=reason) if value is None else Cell(format(value, shape).replace("-", "−"), value)


def spread_cell(spread: Spread | None, shape: str, reason: str) -> Cell:
    """For example "97.59 ± 0.16"; without "±" where there is one seed."""
    if spread is None:
        return Cell(MISSING, reason=reason)
    text = format(spread.mean, shape).replace("-", "−")
    shown = text if spread.std is None else f"{text} ± {format(spread.std, shape)}"
    return Cell(shown, spread.mean, spread.std)


def rate_cell(spread: Spread | None, reason: str) -> Cell:
    """Of images per second, for example "1,204 ± 12" or "8.31 ± 0.20"."""
    digits = 0 if spread is None or spread.mean >= 100 else 1 if spread.mean >= 10 else 2
    return spread_cell(spread, f",.{digits}f", reason)
