"""`scalevit report`: tables, tests, figures and a page from run folders."""

import argparse
import sys
from datetime import datetime
from pathlib import Path

EXAMPLES = """\
  scalevit report runs --output report
  scalevit report runs/none-1 runs/grouped-1 --output report --title "Digits"
  scalevit report runs --output report --baseline grouped

The folder is new, empty, or that of an earlier report, whose files are replaced."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders above them")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the report is written")
    parser.add_argument(
        "--baseline", help="the group to compare with, or one of its runs (default: the one without a reduction)"
    )
    parser.add_argument("--title", default="Report", help="of the page (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Reads the runs and writes the report.

    Raises:
        UserError: there are no runs, the baseline is none of them, or the folder has other content.
    """
    from scalevit.reports.report import PAGE, check_output, make_report, write_report

    check_output(arguments.output)
    report = make_report(
        arguments.runs,
        arguments.output,
        baseline=arguments.baseline,
        title=arguments.title,
        command=["scalevit", *sys.argv[1:]],
        now=datetime.now().astimezone(),
    )
    write_report(report, arguments.output)
    print(f"{report.lead} The page is {arguments.output / PAGE}")
