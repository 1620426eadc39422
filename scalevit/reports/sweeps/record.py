"""What a sweep's folder records of it: sweep.json lists its runs, configs/NAME.json is the whole config of each.

A run is started from the latter, so that it does not depend on what becomes of the sweep's own config file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalevit.errors import UserError
from scalevit.files import locked, write_whole
from scalevit.reports.sweeps.plan import SweepPlan
from scalevit.runs.status import SWEEP_FILE
from scalevit.training.setting_changes import changed_settings, described, without_the_machines

_CONFIGS = "configs"


def config_file(run: Path) -> Path:
    """The config that a sweep starts a run from.

    Args:
        run: its folder.
    """
    return run.parent / _CONFIGS / f"{run.name}.json"


def write_record(plan: SweepPlan) -> None:
    """Adds the runs of a plan to its sweep, with their configs.

    Raises:
        UserError: as `check_record`, or the folder cannot be written.
    """
    check_record(plan)
    try:
        (plan.folder / _CONFIGS).mkdir(parents=True, exist_ok=True)
        with locked(plan.folder / ".record.lock"):  # tasks of a Slurm array may be beside a command that extends it
            runs = {run.name: {"values": run.values, "seed": run.config.seed} for run in plan.runs}
            runs = {**check_record(plan)["runs"], **runs}
            for run in plan.runs:
                settings = {"about": {"sweep": run.combination}, **run.config.model_dump(mode="json")}
                _write_if_new(config_file(run.folder), settings)
            _write_if_new(plan.folder / SWEEP_FILE, {"config": plan.config, "varied": _varied(plan), "runs": runs})
    except OSError as error:
        raise UserError(f"sweep folder {plan.folder}: cannot be written ({error.strerror or error})") from None


def _write_if_new(path: Path, content: Mapping[str, Any]) -> None:
    encoded = (json.dumps(content, indent=2) + "\n").encode()
    if not path.exists() or path.read_bytes() != encoded:
        write_whole(path, encoded)


def check_record(plan: SweepPlan) -> dict[str, Any]:
    """The record of a sweep as it was before, which the plan continues or extends; without runs if it is new.

    Raises:
        UserError: the folder holds another sweep, a run, or a damaged record.
    """
    before = _read(plan.folder)
    if before["runs"]:
        _check_same(before, plan)
    return before


def _varied(plan: SweepPlan) -> dict[str, str]:
    """The key of each label."""
    return {variation.label: variation.key for variation in plan.variations}


def _read(folder: Path) -> dict[str, Any]:
    path = folder / SWEEP_FILE
    if not path.exists():
        if (folder / "config.json").exists():
            raise UserError(f"sweep folder {folder}: is a run's; choose another --name")
        return {"runs": {}}
    record = _read_object(path)
    if not all(isinstance(record.get(key), dict) for key in ("varied", "runs")):
        raise UserError(f"{path}: is damaged; restore it, or choose another --name")
    return record


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is damaged; restore it, or choose another --name")
    return content


def _check_same(before: Mapping[str, Any], plan: SweepPlan) -> None:
    where = f"sweep folder {plan.folder}"
    end = "choose another --name, or remove the folder"
    earlier, now = sorted(map(str, before["varied"].values())), sorted(_varied(plan).values())
    if earlier != now:
        names = [", ".join(keys) or "only the seed" for keys in (earlier, now)]
        raise UserError(f"{where}: varies {names[0]}, not {names[1]}: {end}")
    with_layers = any(variation.has_layers for variation in plan.variations)
    first = next(iter(before["runs"]))
    for run in plan.runs:
        known = run.name in before["runs"]
        if not known and with_layers:
            continue  # a config among the values may change any setting
        reference = _read_object(config_file(run.folder if known else plan.folder / first))
        reference.pop("about", None)
        changes = changed_settings(reference, run.config.model_dump(mode="json"))
        free = () if known else ("seed", *_differing(plan))
        if refused := without_the_machines(changes, *free):
            listed = "; ".join(described(refused))
            raise UserError(f"{where}: was made with other settings ({listed}): undo that, {end}")


def _differing(plan: SweepPlan) -> list[str]:
    """What runs differ in: the keys, and all of a section whose type is varied."""
    keys = [variation.key for variation in plan.variations]
    fields = type(plan.runs[0].config).model_fields
    return [key.rpartition(".")[0] if fields[key.partition(".")[0]].discriminator else key for key in keys]
