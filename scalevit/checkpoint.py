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
    order: dict[str, str | int] = field(default_factory=dict)
    """`TrainLoader.fingerprint`: what the samples of a step follow from."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{_STATE}"))


def save(folder: Path, engine: Engine, ema: Ema | None, state: RunState, config: dict[str, Any], *, keep: int) -> None:
    """Writes `folder/step-NNNNNNNN` and removes all but the newest `keep`. Collective; rank 0 writes.

    Raises:
        UserError: the disk is full or the folder cannot be written; on every rank.
    """
    weights = engine.gather(engine.local_parameters())
    moments = engine.optimizer_state()
    averages = {} if ema is None else engine.gather(ema.tensors)
    problem = ""
    if engine.world.is_first:
        record = {
            "state": asdict(state),
            "optimizer_steps": moments.steps,
            "loss_scale": asdict(engine.loss_scale),
            "config": config,
        }
        files = {
            "weights": weights,
            "optimizer": {
                **{f"exp_avg.{name}": tensor for name, tensor in moments.exp_avg.items()},
                **{f"exp_avg_sq.{name}": tensor for name, tensor in moments.exp_avg_sq.items()},
            },
            "ema": averages,
        }
        try:
            _write(folder, state.step, files, record)
            for old in list_checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            problem = str(error)
    if engine.world.first_decides(bool(problem)):
        raise UserError(f"checkpoint {folder}: cannot be written ({problem or 'see rank 0'})")


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
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def load(checkpoint: Path, engine: Engine, ema: Ema | None) -> RunState:
    """Puts weights, moments, EMA and loss scale back, at any engine and world size. Every rank reads the files.

    Raises:
        UserError: a file is damaged, or it is of another model.
    """
    record = read_state(checkpoint)
    files = {}
    for name in ("weights", "optimizer", "ema"):
        try:
            files[name] = load_file(checkpoint / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint {checkpoint}: {name}.safetensors cannot be read ({error})") from None
    expected = set(engine.local_parameters())
    if set(files["weights"]) != expected:
        different = sorted(set(files["weights"]) ^ expected)
        raise UserError(f"checkpoint {checkpoint}: is of another model ({different[0]} is not in both)")
    engine.load_weights(files["weights"])
    if record["optimizer_steps"]:
        moments = {
            key: {name: files["optimizer"][f"{key}.{name}"] for name in expected} for key in ("exp_avg", "exp_avg_sq")
        }
        engine.load_optimizer_state(
            OptimizerState(record["optimizer_steps"], moments["exp_avg"], moments["exp_avg_sq"])
        )
    if ema is not None:
        # A run that had no EMA so far starts it at the weights.
        ema.load(engine.scatter(files["ema"]) if files["ema"] else engine.local_parameters())
    scale = record["loss_scale"]
    if engine.loss_scale.enabled and scale["enabled"]:
        engine.loss_scale.value, engine.loss_scale.grown_steps = scale["value"], scale["grown_steps"]
    return RunState(**record["state"])
