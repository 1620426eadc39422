"""Checkpoints: one engine-independent form for every engine and world size, without pickle.

A checkpoint is a folder `checkpoints/step-00001234` with three safetensors files (weights, both Adam moments, EMA;
full tensors by canonical name) and `state.json`. It is written under a temporary name and renamed when whole, so a run
that dies while saving finds the checkpoint before. There is no random state in it: every random number of a run is a
function of the seed and the position.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalevit.ema import Ema
from scalevit.engines import Engine, OptimizerState
from scalevit.errors import UserError

_STATE = "state.json"


@dataclass
class RunState:
    """Where a run stands; everything else follows from it, the config and the tensors."""

    step: int = 0
    """Optimizer steps done, also those skipped for an overflow."""
    seconds: float = 0.0
    """Time spent in training steps."""
    timed_images: int = 0
    """Images whose training that time covers."""
    epochs: list[dict[str, Any]] = field(default_factory=list)
    """One record per evaluated epoch."""
    wandb_id: str | None = None


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{_STATE}"))


def save(folder: Path, engine: Engine, ema: Ema | None, state: RunState, about: dict[str, Any], *, keep: int) -> None:
    """Writes `folder/step-NNNNNNNN` and removes all but the newest `keep`. Collective; rank 0 writes.

    Args:
        about: what a resumed run is compared with: "config" and "data", the loader's fingerprint.

    Raises:
        UserError: the disk is full or the folder cannot be written; on every rank.
    """
    weights = engine.gather(engine.local_parameters())
    moments = engine.optimizer_state()
    averages = {} if ema is None else engine.gather(ema.tensors)
    about = {"loss_scale": asdict(engine.loss_scale), **about}
    with engine.world.agreeing_on_errors():  # the others must leave too if the first cannot write
        if engine.world.is_first:
            record = {"state": asdict(state), "optimizer_steps": moments.steps, **about}
            optimizer = {
                **{f"exp_avg.{name}": tensor for name, tensor in moments.exp_avg.items()},
                **{f"exp_avg_sq.{name}": tensor for name, tensor in moments.exp_avg_sq.items()},
            }
            try:
                _write(folder, state.step, {"weights": weights, "optimizer": optimizer, "ema": averages}, record)
                for old in list_checkpoints(folder)[:-keep]:
                    _remove(old)
            except (OSError, SafetensorError) as error:
                raise UserError(f"checkpoint {folder}: cannot be written ({error})") from None


def _write(folder: Path, step: int, files: dict[str, dict[str, Tensor]], record: dict[str, Any]) -> None:
    target = folder / f"step-{step:08d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, tensors in files.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / f"{name}.safetensors")
        (temporary / _STATE).write_text(json.dumps(record, indent=1) + "\n")
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        if target.exists():
            _remove(target)
        temporary.rename(target)
        _flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    # First out of sight: a checkpoint of which half is gone must not be found.
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads((checkpoint / _STATE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {checkpoint}: cannot be read ({error})") from None


@dataclass(frozen=True)
class Contents:
    """A checkpoint as it was read."""

    path: Path
    record: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]


def read(checkpoint: Path) -> Contents:
    """Reads all of a checkpoint. Not collective; every rank reads the files.

    Raises:
        UserError: a file is missing or damaged.
    """
    files = {}
    for name in ("weights", "optimizer", "ema"):
        try:
            files[name] = load_file(checkpoint / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint {checkpoint}: {name}.safetensors cannot be read ({error})") from None
    return Contents(checkpoint, read_state(checkpoint), **files)


def restore(contents: Contents, engine: Engine, ema: Ema | None) -> RunState:
    """Puts weights, moments, EMA and loss scale back, at any engine and world size. Collective.

    Raises:
        UserError: the checkpoint is of another model.
    """
    expected = set(engine.local_parameters())
    moments = {
        key: {name: contents.optimizer.get(f"{key}.{name}") for name in expected} for key in ("exp_avg", "exp_avg_sq")
    }
    steps = contents.record["optimizer_steps"]
    incomplete = steps and any(tensor is None for moment in moments.values() for tensor in moment.values())
    different = sorted(set(contents.weights) ^ expected)
    if different or incomplete:
        which = different[0] if different else "an optimizer moment"
        raise UserError(f"checkpoint {contents.path}: is of another model ({which} is not in both)")
    engine.load_weights(contents.weights)
    engine.load_optimizer_state(
        OptimizerState(steps, **{k: {n: t for n, t in m.items() if t is not None} for k, m in moments.items()})
    )
    if ema is not None:
        # A run that had no EMA so far starts it at the weights.
        ema.load(engine.scatter(contents.ema) if contents.ema else engine.local_parameters())
    scale = contents.record["loss_scale"]
    if engine.loss_scale.enabled and scale["enabled"]:
        engine.loss_scale.value, engine.loss_scale.grown_steps = scale["value"], scale["grown_steps"]
    return RunState(**contents.record["state"])
