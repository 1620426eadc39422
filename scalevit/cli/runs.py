"""`scalevit runs`: lists runs with state, progress and best result. Arguments and printing; must not import torch."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from scalevit.cli.status_cells import COLORS, age, best_top1, duration, of_total
from scalevit.errors import UserError
from scalevit.runs.status import STATES, RunStatus, find_runs, read_status
from scalevit.runs.summary import EMA, WEIGHTS
from scalevit.terminal import narrow_table, print_table

EXAMPLES = """\
  scalevit runs                             # all runs below runs/
  scalevit runs runs/quickstart-sweep       # those of a sweep, also runs that have not started
  scalevit runs --json > runs.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="where to look (default: runs)")
    parser.add_argument("--json", action="store_true", help="print all that is known as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Prints the runs below a folder: those in progress first, then by the time of their last record.

    Raises:
        UserError: there is no such folder, or it cannot be read.
    """
    folder = arguments.folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    try:
        found = find_runs(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    statuses = sorted(map(read_status, found), key=_order)
    if arguments.json:
        print(json.dumps([_to_json(status) for status in statuses], indent=2))
    elif not statuses:
        print(f"no runs in {folder}")
    else:
        _print(statuses, folder)


def _order(status: RunStatus) -> tuple[bool, bool, float, str]:
    """Running ones first, then the latest; those that have not started last."""
    return status.state != "running", status.changed is None, -(status.changed or 0.0), str(status.path)


def _to_json(status: RunStatus) -> dict[str, Any]:
    return {"name": status.name, **asdict(status), "path": str(status.path)}


def _print(statuses: list[RunStatus], folder: Path) -> None:
    now = time.time()
    table = narrow_table(
        *("run", "state", "epoch", "step", "EMA top-1", "weights top-1", "time", "last record"),
        text={"run", "state"},
    )
    problems = []
    for status in statuses:
        name = status.name if status.path == folder else str(status.path.relative_to(folder))
        table.add_row(
            Text(name),
            Text(status.state, style=COLORS[status.state]),
            of_total(status.epoch, status.epochs),
            of_total(status.step, status.steps),
            best_top1(status, EMA),
            best_top1(status, WEIGHTS),
            duration(status.seconds),
            "-" if status.changed is None else f"{age(now - status.changed)} ago",
        )
        if status.problem is not None:
            problems.append(f"{name}: {status.problem}")
    states = [status.state for status in statuses]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    print_table(table, counts, *problems)
