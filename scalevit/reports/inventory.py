"""The runs of a report themselves: tables of runs, of their settings and of their environments.

Knows runs and groups. Must not know how a table is written.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scalevit.reports.groups import Group, differing_settings
from scalevit.reports.runs import WEIGHT_SETS, Accuracy, Run
from scalevit.reports.statistics import Spread
from scalevit.reports.tables import MISSING, Cell, Column, Table, number_cell, rate_cell, text_cell


def run_table(groups: Sequence[Group], ungrouped: Sequence[Run], output: Path) -> Table:
    """Every run, finished or not, with links to its files.

    Args:
        output: folder that links are relative to.
    """
    columns = [
        *(Column(key, key, is_text=True) for key in ("run", "group", "seed", "state")),
        Column("step", "last step"),
        Column("epoch", "last evaluated epoch"),
        *(
            Column(f"{weight_set}_{name}_percent", f"{shown} {title}")
            for weight_set, shown in WEIGHT_SETS.items()
            for name, title in (("best_top1", "best top-1"), ("last_top1", "last top-1"))
        ),
        Column("images_per_second", "images/s"),
        Column("config", "config", is_text=True),
        Column("environment", "environment", is_text=True),
        Column("remarks", "remarks", is_text=True),
    ]
    placed = [(group.label, run) for group in groups for run in group.runs]
    rows = [_run_row(label, run, output) for label, run in [*placed, *((MISSING, run) for run in ungrouped)]]
    notes = ["Accuracies of a run that is not finished are those so far, and count in no mean."]
    return Table("runs", "Runs", columns, rows, notes)


def _run_row(label: str, run: Run, output: Path) -> list[Cell]:
    last_epoch = run.evaluations[-1]["epoch"] if run.evaluations else None
    speed = run.of_summary("images_per_second")
    cells = []
    for weight_set in WEIGHT_SETS:
        cells += [number_cell(value, ".2f", "") for value in _best_and_last(run.accuracy.get(weight_set))]
    return [
        text_cell(run.name),
        text_cell(label),
        text_cell(MISSING if run.seed is None else str(run.seed)),
        text_cell(run.state),
        number_cell(run.step, ",", ""),
        number_cell(last_epoch, "d", ""),
        *cells,
        rate_cell(None if speed is None else Spread(speed, None, 1), ""),
        *(_link(run.folder / name, output) for name in ("config.json", "environment.json")),
        text_cell("; ".join(run.notes)),
    ]


def _best_and_last(own: Accuracy | None) -> tuple[float | None, float | None]:
    return (None, None) if own is None else (own.top1, own.final_top1)


def _link(path: Path, output: Path) -> Cell:
    if not path.exists():
        return text_cell("")
    relative = Path(os.path.relpath(path.resolve(), output.resolve()))
    return Cell(path.name, relative.as_posix(), link=relative)


def settings_table(groups: Sequence[Group]) -> Table:
    """The settings in which the groups differ."""
    differing = differing_settings(groups)
    columns = [
        Column("setting", "setting", is_text=True),
        *(Column(f"group_{index}", group.label, is_text=True) for index, group in enumerate(groups)),
    ]
    rows = [[text_cell(key), *map(text_cell, values)] for key, values in differing.items()]
    return Table(
        "settings", "Settings that differ", columns, rows, [] if rows else ["All runs have the same settings."]
    )


def _package(name: str) -> Callable[[Run], object]:
    def version(run: Run) -> object:
        packages = run.environment.get("packages")
        return packages.get(name) if isinstance(packages, Mapping) else None

    return version


_ENVIRONMENT: Mapping[str, Callable[[Run], object]] = {
    "device": lambda run: run.environment.get("device"),
    "ranks": lambda run: run.environment.get("world_size"),
    "CPUs": lambda run: run.environment.get("cpus"),
    "precision": lambda run: (run.summary or {}).get("precision"),
    "Python": lambda run: run.environment.get("python"),
    **{name: _package(name) for name in ("scalevit", "torch", "timm", "deepspeed")},
    "commit": lambda run: str(run.environment.get("git_commit") or "")[:12] or None,
}
# Of these, the ones that a rate depends on most.
_MACHINE = 3


def environment_table(runs: Sequence[Run]) -> Table:
    """The different environments, and how many runs each has."""
    counts: dict[tuple[str, ...], int] = {}
    for run in runs:
        if run.environment:
            row = tuple(MISSING if (value := read(run)) is None else str(value) for read in _ENVIRONMENT.values())
            counts[row] = counts.get(row, 0) + 1
    columns = [*(Column(name, name, is_text=True) for name in _ENVIRONMENT), Column("runs", "runs")]
    rows = [[*map(text_cell, row), Cell(str(count), count)] for row, count in counts.items()]
    different = len({row[:_MACHINE] for row in counts}) > 1
    notes = ["The runs' machines differ: compare their images per second with care."] if different else []
    return Table("environments", "Environments", columns, rows, notes)
