"""sweep.json: which runs a sweep has, and whether a command continues or extends it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalevit.errors import UserError
from scalevit.files import write_whole
from scalevit.reports.sweeps.plan import SweepPlan, SweepRun
from scalevit.runs.status import SWEEP_FILE
from scalevit.training.setting_changes import changed_settings, described, without_the_machines


def write_record(plan: SweepPlan) -> None:
    """Adds the runs of a plan to its sweep.

    Raises:
        UserError: the folder holds another sweep, or something else, or it cannot be written.
    """
    before = _read(plan.folder)
    if before is not None:
        _check_same(before, plan)
    runs = dict(before["runs"]) if before else {}
    # The config of a run that is there already stays the one it was made with.
    runs |= {run.name: _of_run(run) for run in plan.runs if run.name not in runs}
    record = {"config": plan.config, "varied": _varied(plan), "runs": runs}
    if record == before:
        return
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        write_whole(plan.folder / SWEEP_FILE, (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"sweep folder {plan.folder}: cannot be written ({error.strerror or error})") from None


def check_record(plan: SweepPlan) -> None:
    """As `write_record`, without writing."""
    if (before := _read(plan.folder)) is not None:
        _check_same(before, plan)


def _of_run(run: SweepRun) -> dict[str, Any]:
    return {"values": run.values, "seed": run.config.seed, "config": run.config.model_dump(mode="json")}


def _varied(plan: SweepPlan) -> dict[str, str]:
    """The key of each label."""
    return {variation.label: variation.key for variation in plan.variations}


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / SWEEP_FILE
    if not path.exists():
        if (folder / "config.json").exists():
            raise UserError(f"sweep folder {folder}: is a run's; choose another --name")
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for run in record["runs"].values():
            if not isinstance(run["config"], dict):
                raise TypeError("a run has no config")
        if not isinstance(record["varied"], dict):
            raise TypeError("`varied` is no object")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); restore it, or choose another --name") from None
    return dict(record)


def _check_same(before: Mapping[str, Any], plan: SweepPlan) -> None:
    where = f"sweep folder {plan.folder}"
    end = "choose another --name, or remove the folder"
    earlier, now = set(before["varied"].values()), {variation.key for variation in plan.variations}
    if earlier != now:
        names = (", ".join(sorted(keys)) or "only the seed" for keys in (earlier, now))
        raise UserError(f"{where}: varies {next(names)}, not {next(names)}: {end}")
    for run in plan.runs:
        known = before["runs"].get(run.name)
        if known is None and any(variation.has_layers for variation in plan.variations):
            continue  # a config among the values may change any setting
        reference = known or next(iter(before["runs"].values()), None)
        if reference is None:
            continue
        changes = changed_settings(reference["config"], run.config.model_dump(mode="json"))
        free = () if known else ("seed", *_sections(plan))
        if refused := without_the_machines(changes, *free):
            listed = "; ".join(described(refused))
            raise UserError(f"{where}: was made with other settings ({listed}): undo that, {end}")


def _sections(plan: SweepPlan) -> list[str]:
    """What runs differ in: the keys, and all of a section whose type is varied."""
    keys = [variation.key for variation in plan.variations]
    fields = type(plan.runs[0].config).model_fields
    return [key.rpartition(".")[0] if fields[key.partition(".")[0]].discriminator else key for key in keys]
