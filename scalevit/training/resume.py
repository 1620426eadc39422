"""Which checkpoint a run resumes from, and what must not have changed since.

Reads records, no tensors. The order of the data is compared by `check_fingerprint` once the loader is open.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scalevit.checkpoint.folder import list_resumable, read_record
from scalevit.config.model import WEIGHTS_SETTINGS
from scalevit.config.tree import SECTIONS, Config
from scalevit.errors import SettingError, UserError, naming_settings
from scalevit.models.build import build_model
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions import REDUCTIONS
from scalevit.runs.folder import RunFolder
from scalevit.training.setting_changes import changed_fingerprint, check_changes, effective_changes

# Of the model section; they act at initialisation or during training only.
_FREE_MODEL_SETTINGS = {*WEIGHTS_SETTINGS, "drop_path", "drop_path_mode", "head_init_scale", "head_init_bias"}


def find_resumable(config: Config, folder: RunFolder) -> list[Path]:
    """The checkpoints that a run may resume from, the newest first; [] for a new run.

    Raises:
        UserError: `train.resume` does not fit what the folder holds, the checkpoints are those of another run, or
            settings have changed that `train.resume_changes` does not allow to.
    """
    found = list_resumable(folder.checkpoints)
    resume = config.train.resume
    if not found:
        if resume is True:
            raise UserError(f"train.resume = true, but {folder.checkpoints} holds no checkpoint")
        return []
    if resume is False:
        raise UserError(
            f"train.resume = false, but {folder.path} holds the checkpoints of a run: choose another name, or remove it"
        )
    record = _newest_record(found)
    if record is not None:
        before = record["config"]
        where = f"run folder {folder.path}"
        check_same_run(before, config, where)
        check_changes(effective_changes(before, config.model_dump(mode="json")), config.train.resume_changes, where)
    return found


def check_fingerprint_of_task(
    checkpoints: Sequence[Path], fingerprint: Mapping[str, str], config: Config, folder: RunFolder
) -> None:
    """Refuses to resume a run with another teacher, or whatever else its task has loaded.

    Args:
        checkpoints: what the run may resume from, the newest first.
        fingerprint: the task's, of this start.

    Raises:
        UserError: it differs, and `train.resume_changes` does not allow it.
    """
    record = _newest_record(checkpoints)
    # A task that has changed itself has been allowed to by then.
    if record is not None and record["config"].get("task", {}).get("name") == config.task.name:
        changes = changed_fingerprint(record.get("task", {}), fingerprint)
        check_changes(changes, config.train.resume_changes, f"run folder {folder.path}")


def check_same_run(before: Mapping[str, Any], now: Config, where: str) -> None:
    """Refuses to resume a run with a config that makes another run of it.

    The one list of what must not change: the model without its initial weights and `drop_path`, the structure of its
    reduction, the seed, and the order of the data (which `check_fingerprint` compares). Everything else may change,
    some of it only with the user's consent (`setting_changes`).

    Args:
        before: whole config of the checkpoint, plain JSON values.
        now: of this start.
        where: what holds the first, for the message.

    Raises:
        UserError: they differ; names the first section that does.
    """
    present = now.model_dump(mode="json")
    models = _fixed_part(before["model"]), _fixed_part(present["model"])
    same = {
        "model": models[0] == models[1],
        "reduction": before["reduction"] == present["reduction"] or _same_structure(before["reduction"], now),
        "seed": before["seed"] == present["seed"],
    }
    for section, is_same in same.items():
        if not is_same:
            earlier, wanted = models if section == "model" else (before[section], present[section])
            raise UserError(
                f"{where}: was made with another {section} ({_differences(section, earlier, wanted)}): choose another "
                "name, or remove it"
            )


def _differences(key: str, before: Any, now: Any) -> str:
    """For example "model.image_size: 160 then, 224 now"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return ", ".join(_differences(f"{key}.{name}", before.get(name), now.get(name)) for name in names)
    return f"{key}: {json.dumps(before)} then, {json.dumps(now)} now"


def _fixed_part(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key not in _FREE_MODEL_SETTINGS}


def _same_structure(before: Mapping[str, Any], now: Config) -> bool:
    """Whether a model that was reduced with other settings has the same parameters."""
    parts = {part.kind(): part for part in REDUCTIONS}
    try:
        earlier = parts[before["strategy"]].model_validate(before)
    except (KeyError, ValidationError):  # settings of another version
        return False
    shapes = now.model.without_weights()
    with naming_settings(SECTIONS):
        depth = len(transformer_blocks(build_model(shapes, now.reduction, seed=0, device="meta")))
    try:
        return earlier.structure(depth) == now.reduction.structure(depth)
    except SettingError:  # a model of another depth, which the comparison of the model reports
        return False


def check_classes(before: Sequence[str] | None, now: Sequence[str] | None, where: str) -> None:
    """Refuses to resume where a label has another name. Names that are not known are not compared.

    Args:
        before: names of labels 0... at the last save.
        now: of the training set.
        where: what holds the first, for the message.

    Raises:
        UserError: names the first such label.
    """
    if before is None or now is None:
        return
    for label, (there, here) in enumerate(zip_longest(before, now)):
        if there != here:
            raise UserError(
                f"{where}: label {label} was class {there!r} and is {here!r} in data.train: choose another name, or "
                "restore the set"
            )


def _newest_record(checkpoints: Sequence[Path]) -> dict[str, Any] | None:
    """The record of the newest checkpoint that has one that can be read; damage is reported when the run starts."""
    for checkpoint in checkpoints:
        try:
            return read_record(checkpoint)
        except UserError:
            continue
    return None
