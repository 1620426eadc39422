"""What the commands are given as trained weights: a run, a weights file, a checkpoint, or an export.

Knows names of files, configs and records of runs. Imports no torch unless a file must say itself what it is, so that a
mistake in the arguments is reported at once.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scalevit.checkpoint.folder import MANIFEST, find_checkpoint, list_checkpoints, read_record
from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.errors import UserError
from scalevit.export import EXPORTERS
from scalevit.export.base import Exporter
from scalevit.runs.records import read_records
from scalevit.runs.summary import EMA, WEIGHTS, is_ema_best

WeightSet = Literal["ema", "weights"]
# Of a run folder, the first that exists; the two of either kind change places where the plain weights were better.
_EMA_FILES = ("best_ema.safetensors", "final_ema.safetensors")
_FILES = ("best.safetensors", "final.safetensors")
_ALL_FILES = (_EMA_FILES[0], _FILES[0], _EMA_FILES[1], _FILES[1])


@dataclass(frozen=True)
class Source:
    """Trained weights on disk, and the config that belongs to them."""

    path: Path
    """A weights file, a checkpoint, or an export."""
    config: Config
    """Of the run; a weights file is its `model.initial_weights`. For an export: of the validation images only."""
    has_run: bool = True
    """Whether the config is a run's or the user's, so that it knows the data; else it only says what the file does."""
    exporter: Exporter | None = None
    """What wrote it, if it is an export."""
    part: WeightSet | None = None
    """Which weights of a checkpoint; None if it is none."""

    def __str__(self) -> str:
        return f"{'EMA' if self.part == EMA else 'weights'} of {self.path}" if self.part else str(self.path)


def find_source(
    target: str,
    *,
    config: str | None = None,
    overrides: Sequence[str] = (),
    weights: WeightSet | None = None,
    config_required: bool = True,
) -> Source:
    """Finds out what a target is.

    Args:
        target: a run folder, whose best weights are taken; a checkpoint, or a folder of them, of which the newest is
            taken; a weights file; an export.
        config: as given by `--config`; None takes that of the run: of the checkpoint, or in the folder or beside the
            file.
        overrides: of its settings.
        weights: which of a run or a checkpoint; None takes the better of a run, and the EMA of a checkpoint if it has
            one.
        config_required: refuse a weights file without a config beside it, even one that says itself of which model it
            is.

    Raises:
        UserError: there are no weights, or no config.
    """
    path = Path(target)
    if not path.exists():
        raise UserError(f"weights {target}: no such file or folder")
    exporter = exporter_of(path)
    is_run = path.is_dir() and exporter is None
    checkpoint = _checkpoint(path) if is_run else None
    if weights is not None and not is_run:
        raise UserError(f"--weights applies to runs and checkpoints, and {target} is a file or an export")
    if exporter is not None:
        for override in overrides:
            if not override.startswith(("data.", "evaluation.")):
                raise UserError(f"{override}: of an export only settings of data and evaluation can be given")
        settings = load_config(config or _bounded_workers(), overrides)
        return Source(path, settings, has_run=config is not None, exporter=exporter)
    if checkpoint is not None:
        record = read_record(checkpoint)
        part: WeightSet = weights or ("ema" if EMA in record["parts"] else "weights")
        if part not in record["parts"]:
            raise UserError(f"checkpoint {checkpoint}: contains no EMA weights")
        return Source(checkpoint, load_config(config or record["config"], overrides), part=part)
    file = _best_weights(path, weights) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"weights {file}: no such file")
    recorded = file.parent / "config.json"
    if config is None and exporter_of(file.parent) is not None:
        raise UserError(f"{file}: is part of the export {file.parent}: name the folder")
    if config is None and not recorded.is_file():
        own = None if config_required else _own_settings(file)
        if own is None:
            raise UserError(f"{file}: there is no config.json beside it: give --config")
        return Source(file, _naming(load_config({**own, **_bounded_workers()}, overrides), file), has_run=False)
    return Source(file, _naming(load_config(config or _without_start(recorded), overrides), file))


def exporter_of(path: Path) -> Exporter | None:
    """What reads a file or folder, if it is an export."""
    return next((exporter for exporter in EXPORTERS if exporter.recognises(path)), None)


def _bounded_workers() -> dict[str, Any]:
    """Settings where no run's config says how many processes load images: the default, but at most one per core."""
    return {"data": {"workers": min(Config().data.workers, len(os.sched_getaffinity(0)))}}


def _naming(config: Config, file: Path) -> Config:
    """The config with a weights file as its initial weights."""
    return config.model_copy(
        update={"model": config.model.model_copy(update={"initial_weights": str(file), "pretrained": False})}
    )


def _without_start(recorded: Path) -> dict[str, Any]:
    """A run's config without its choice among the weights that it started from, which its own files do not have."""
    content = load_config(recorded).model_dump(mode="json")
    del content["model"]["initial_weights_set"]
    return content


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint that a folder is, or the newest if it is a folder of them; intact.

    Raises:
        UserError: it is damaged.
    """
    return find_checkpoint(path) if (path / MANIFEST).is_file() or list_checkpoints(path) else None


def _best_weights(folder: Path, weights: WeightSet | None) -> Path:
    """The file of the best evaluation in metrics.jsonl: of the EMA, or of the plain weights if they were better."""
    names = {None: _ALL_FILES, EMA: _EMA_FILES, WEIGHTS: _FILES}[weights]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"run folder {folder}: has none of {', '.join(names)}")
    if weights is None:
        records, _ = read_records(folder / "metrics.jsonl")
        if not is_ema_best(records, load_config(folder / "config.json").evaluation.metric):
            found.sort(key=lambda path: (path.name.startswith("final"), path.name in _EMA_FILES))
    return found[0]


def _own_settings(file: Path) -> dict[str, object] | None:
    """The sections of a config that a weights file of ours has in itself; None for another file."""
    from scalevit.models.weights.description import read_description

    own = read_description(file)
    sections: dict[str, object] = {key: own[key] for key in ("model", "reduction") if key in own}
    return sections if len(sections) == 2 else None
