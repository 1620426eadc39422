"""Which checkpoint a run resumes from, and what must not have changed since.

Reads records, no tensors. The order of the data is compared by `check_fingerprint` once the loader is open.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scalevit.checkpoint.folder import list_resumable, read_record
from scalevit.config.tree import Config
from scalevit.errors import UserError
from scalevit.runs.folder import RunFolder

# Act at initialisation or during training only: two models that differ in them can share weights.
_INITIALISATION = {"scale", "select_units"}
_NOT_OF_THE_MODEL = {"initial_weights", "drop_path"}


def find_resumable(config: Config, folder: RunFolder) -> list[Path]:
    """The checkpoints that a run may resume from, the newest first; [] for a new run.

    Raises:
        UserError: `train.resume` does not fit what the folder holds, or the checkpoints are those of another run.
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
    before = _newest_config(found)
    if before is not None:
        check_same_run(before, config.model_dump(mode="json"), f"run folder {folder.path}")
    return found


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuses to resume a run with a config that makes another run of it.

    Args:
        before: whole config of the checkpoint, plain JSON values.
        now: of this start.
        where: what holds the first, for the message.

    Raises:
        UserError: they differ in what `fixed_settings` lists; names the first difference.
    """
    there, here = fixed_settings(before), fixed_settings(now)
    for section, value in there.items():
        if value != here[section]:
            raise UserError(
                f"{where}: was made with another {section} ({before[section]}): choose another name, or remove it"
            )


def fixed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must have in common with its checkpoint, by section. Everything else may change."""
    return {
        "model": {key: value for key, value in config["model"].items() if key not in _NOT_OF_THE_MODEL},
        "reduction": _structure(config["reduction"]),
        "seed": config["seed"],
    }


def _structure(reduction: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a reduction that decide which weights there are, in one form."""
    structure = {key: value for key, value in reduction.items() if key not in _INITIALISATION}
    if structure.get("groups", ...) is None:
        structure["group_size"] = structure["group_size"] or 2
    return structure


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ between two whole configs, each as "key: before -> now"."""
    return [f"{key}: {old} -> {new}" for key, old, new in _differences(before, now)]


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in {**before, **now}:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now


def _newest_config(checkpoints: Sequence[Path]) -> dict[str, Any] | None:
    """The config of the newest checkpoint whose record can be read; damage is reported when the run starts."""
    for checkpoint in checkpoints:
        try:
            return read_record(checkpoint)["config"]
        except UserError:
            continue
    return None
