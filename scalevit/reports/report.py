"""A report: what is found in run folders, put together once and written as a page, as Markdown and as CSV.

Knows tables, figures and their writers. Must not know how they are computed.
"""

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from scalevit import __version__
from scalevit.errors import UserError
from scalevit.files import check_new, check_writable, write_whole
from scalevit.reports.curves import Figure
from scalevit.reports.figures import figures_of
from scalevit.reports.groups import Group, baseline_first, group_runs
from scalevit.reports.inventory import environment_table, run_table, settings_table
from scalevit.reports.markdown import to_markdown
from scalevit.reports.page import GENERATOR, to_html
from scalevit.reports.results import accuracy_table, compare, comparison_table, model_table
from scalevit.reports.runs import Run, find_run_folders, read_run
from scalevit.reports.tables import Table
from scalevit.runs.status import STATES

PAGE, MARKDOWN = "report.html", "report.md"


@dataclass(frozen=True)
class Report:
    """Everything that a report shows."""

    title: str
    lead: str
    """What the runs are, in a sentence."""
    origin: str
    """Command and date."""
    groups: Sequence[Group]
    baseline: Group | None
    tables: Sequence[Table]
    figures: Sequence[Figure]


def make_report(
    paths: Sequence[Path], output: Path, *, baseline: str | None, title: str, command: Sequence[str], now: datetime
) -> Report:
    """Reads the runs in and below some folders, and computes their report.

    Args:
        paths: run folders, or folders above them.
        output: folder of the report, for links to the runs.
        baseline: label of a group or name of a run; by default the only group without a reduction.
        title: of the page.
        command: that makes the report, for its record.
        now: when.

    Raises:
        UserError: there is no run, a file cannot be read, or no group of that name.
    """
    runs = [read_run(folder) for folder in find_run_folders(paths)]
    groups, ungrouped = group_runs(runs)
    groups, compared_with = baseline_first(groups, baseline)
    comparisons = [] if compared_with is None else compare(groups, compared_with)
    tables = [
        accuracy_table(groups),
        comparison_table(groups, compared_with, comparisons),
        model_table(groups),
        settings_table(groups),
        run_table(groups, ungrouped, output),
        environment_table(runs),
    ]
    origin = f"Made {now:%Y-%m-%d %H:%M} by scalevit {__version__}: {shlex.join(command)}"
    return Report(title, _lead(groups, runs), origin, groups, compared_with, tables, figures_of(groups))


def _lead(groups: Sequence[Group], runs: Sequence[Run]) -> str:
    parts = [_count(len(groups), "group"), _count(sum(run.state == "finished" for run in runs), "finished run")]
    for state in (state for state in STATES if state != "finished"):
        if found := sum(run.state == state for run in runs):
            parts.append(f"{found} {state}")
    return ", ".join(parts) + "."


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def check_output(folder: Path) -> None:
    """Makes sure that a report can be written, before the work that it is for.

    A report is made again as its runs advance, so a folder that holds a report may be written again; only the
    report's own files are replaced. No other folder with content is used.

    Raises:
        UserError: the folder has other content, or cannot be written.
    """
    page = folder / PAGE
    if not (page.is_file() and (folder / MARKDOWN).is_file()):  # a run folder has a page as well
        check_new(folder, folder=True)
        return
    try:
        with page.open("rb") as file:
            beginning = file.read(1000)
    except OSError as error:
        raise UserError(f"{page}: cannot be read ({error.strerror or error})") from None
    if GENERATOR.encode() not in beginning:
        raise UserError(f"{page}: was not written by this command; choose another folder")
    check_writable(page)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes the report's files, the page last.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    contents = {folder / f"{table.name}.csv": _to_csv(table) for table in report.tables}
    contents[folder / MARKDOWN] = to_markdown(report.title, report.lead, report.origin, report.tables)
    contents[folder / PAGE] = to_html(
        report.title, report.lead, report.origin, report.groups, report.baseline, report.tables, report.figures
    )
    try:
        folder.mkdir(exist_ok=True)
        for path, content in contents.items():
            write_whole(path, content.encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return list(contents)


def _to_csv(table: Table) -> str:
    """Unrounded numbers; a missing one is empty. A mean has its standard deviation in a column of its own."""
    headings = [[column.key, f"{column.key}_std"] if column.has_std else [column.key] for column in table.columns]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([heading for pair in headings for heading in pair])
    for row in table.rows:
        values = [
            [cell.value, cell.std] if column.has_std else [cell.value]
            for column, cell in zip(table.columns, row, strict=True)
        ]
        writer.writerow(["" if value is None else value for pair in values for value in pair])
    return text.getvalue()
