"""Between checkpoints of ours, weights files, and DeepSpeed's own checkpoints."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scalevit.checkpoint.folder import find_damage, list_checkpoints, read_record
from scalevit.checkpoint.restore import read_parts, restore
from scalevit.checkpoint.run_state import RunState
from scalevit.checkpoint.saver import Saver, versions
from scalevit.config.loading import validate
from scalevit.config.training import CheckpointConfig
from scalevit.config.tree import SECTIONS, Config
from scalevit.distributed import World
from scalevit.engines.base import Setup
from scalevit.engines.deepspeed.checkpoints import Native, read_deepspeed
from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.factory import build_engine
from scalevit.engines.state import Piece
from scalevit.errors import UserError, naming_settings
from scalevit.models.build import build_model
from scalevit.models.mlps import transformer_blocks
from scalevit.models.weights.write import write_weights
from scalevit.training.optimizers import build_optimizer
from scalevit.tying import tied_names


def find_checkpoint(path: Path) -> Path:
    """A checkpoint, or the newest of a run folder or of its `checkpoints`; whole.

    Raises:
        UserError: there is none, or it is damaged.
    """
    found = next((c for c in (path, *all_checkpoints(path)[::-1]) if (c / "manifest.json").is_file()), None)
    if found is None:
        raise UserError(f"{path}: holds no checkpoint")
    if problems := find_damage(found):
        raise UserError(f"checkpoint {found}: {problems[0]}")
    return found


def all_checkpoints(path: Path) -> list[Path]:
    """Those of a run folder or of its `checkpoints`, the oldest first."""
    return list_checkpoints(path / "checkpoints") or list_checkpoints(path)


def to_weights(checkpoint: Path, target: Path, *, ema: bool) -> None:
    """Writes `target` (.safetensors): the model's weights under canonical names, tying in the metadata.

    Raises:
        UserError: there is no EMA, or a file cannot be read or written.
    """
    record = read_record(checkpoint)
    part = "ema" if ema else "weights"
    if part not in record["parts"]:
        raise UserError(f"checkpoint {checkpoint}: has no EMA")
    shapes = {name: torch.Size(shape) for name, shape in record["tensors"].items()}
    whole = {name: Piece(torch.empty(shape.numel(), device="meta"), 0, shape) for name, shape in shapes.items()}
    flat = read_parts(checkpoint, {part: whole})[part]
    # Of an older config only this has to be understood.
    config = validate({key: record["config"].get(key, {}) for key in ("model", "reduction")})
    _write_weights(
        target, {name: flat[name].values.view(shape) for name, shape in shapes.items()}, config, record["tied"]
    )


def to_deepspeed(checkpoint: Path, target: Path, *, stage: Literal[0, 1, 2, 3], world: World) -> None:
    """Writes a folder that DeepSpeed's `load_checkpoint` reads, at this world size. Collective.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    record = read_record(checkpoint)
    config = validate(record["config"])
    model = _model_of(config)
    setup = Setup(
        world=world,
        blocks=transformer_blocks(model),
        optimizer=partial(build_optimizer, config=config.optimizer),
        micro_batch=config.train.micro_batch,
        accumulation=1,
        precision="fp32",
    )
    engine: Any = build_engine(model, setup, DeepSpeedSettings(stage=stage))
    state = restore(checkpoint, engine, None)
    engine.save_native(target, f"global_step{state.step}", state.step)


def from_deepspeed(source: Path, config: Config) -> Native:
    """What a DeepSpeed run of this config's model saved.

    Raises:
        UserError: it cannot be read, or is of another model.
    """
    model = _model_of(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config.optimizer).param_groups
    native = read_deepspeed(source, [names[id(parameter)] for group in groups for parameter in group["params"]])
    own = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in sorted(own.keys() | native.shapes.keys()):
        there, here = native.shapes.get(name), own.get(name)
        if there != here:
            shown = [list(shape) if shape else "not" for shape in (there, here)]
            raise UserError(f"{source}: is of another model ({name} is {shown[0]} there, {shown[1]} in the config)")
    return native


def native_to_checkpoint(native: Native, run_folder: Path, config: Config) -> Path:
    """Writes it as the checkpoint of a run that `launch/train.py` goes on with.

    Raises:
        UserError: the run folder has checkpoints, or cannot be written.
    """
    folder = run_folder / "checkpoints"
    if list_checkpoints(folder):
        raise UserError(f"{folder}: holds checkpoints; name another run folder")
    parts: dict[str, Mapping[str, Tensor]] = {"weights": native.weights}
    if native.optimizer_steps:
        parts |= {"exp_avg": native.exp_avg, "exp_avg_sq": native.exp_avg_sq}
    pieces = {
        f"{part}.{name}": Piece(values, 0, native.shapes[name])
        for part, tensors in parts.items()
        for name, values in tensors.items()
    }
    model = _model_of(config)
    record = {
        "state": asdict(RunState(step=native.step)),
        "score": None,
        "optimizer_steps": native.optimizer_steps,
        "loss_scale": {"value": 1.0, "grown_steps": 0, "enabled": False},
        "config": config.model_dump(mode="json"),
        "data": None,  # its images came in an order of its own
        "tensors": {name: list(shape) for name, shape in native.shapes.items()},
        "parts": sorted(parts),
        "tied": tied_names(model),
        "world_size": 1,
        "versions": versions(),
    }
    alone = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    Saver(folder, alone, CheckpointConfig()).write(native.step, pieces, record)
    return folder / f"step-{native.step:08d}"


def native_to_weights(native: Native, target: Path, config: Config) -> None:
    """Writes `target` (.safetensors) with the model's weights.

    Raises:
        UserError: it cannot be written.
    """
    model = _model_of(config)
    tensors = {name: native.weights[name].view(shape) for name, shape in native.shapes.items()}
    _write_weights(target, tensors, config, tied_names(model))


def _model_of(config: Config) -> nn.Module:
    with naming_settings(SECTIONS):
        return build_model(config.model, config.reduction, seed=config.seed)


def _write_weights(target: Path, tensors: Mapping[str, Tensor], config: Config, tied: Mapping[str, str]) -> None:
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder")
    write_weights(target, tensors, model=config.model, reduction=config.reduction, tied=tied)
