"""Between scalevit's checkpoints, weights files, and DeepSpeed's own checkpoints.

Above the checkpoints' room, because it builds models, optimizers and engines.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scalevit.checkpoint.folder import checkpoint_path, list_checkpoints, read_record
from scalevit.checkpoint.optimizer_record import to_record
from scalevit.checkpoint.restore import read_parts, restore
from scalevit.checkpoint.run_state import RunState
from scalevit.checkpoint.saver import Saver, versions
from scalevit.config.loading import validate
from scalevit.config.training import CheckpointConfig
from scalevit.config.tree import SECTIONS, Config
from scalevit.distributed import World
from scalevit.engines.base import EngineSpec
from scalevit.engines.deepspeed.checkpoints import DeepSpeedCheckpoint, read_deepspeed
from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.precision import LossScale
from scalevit.engines.state import OptimizerState, TensorSlice
from scalevit.errors import UserError, naming_settings
from scalevit.models.build import build_model
from scalevit.models.mlps import transformer_blocks
from scalevit.models.weights.write import write_weights
from scalevit.training.optimizers import build_optimizer, check_optimizer
from scalevit.tying import tied_names

_KEYS = {"optimizer": "optimizer.name", "optimizer_args": "optimizer.args"}


def to_weights(checkpoint: Path, target: Path, *, ema: bool) -> None:
    """Writes `target` (.safetensors): the model's weights under canonical names, tying in the metadata.

    Raises:
        UserError: there is no EMA, or a file cannot be read or written.
    """
    record = read_record(checkpoint)
    part = "ema" if ema else "weights"
    if part not in record["parts"]:
        raise UserError(f"checkpoint {checkpoint}: contains no EMA weights")
    shapes = {name: torch.Size(shape) for name, shape in record["tensors"].items()}
    flat = {name: TensorSlice(torch.empty(shape.numel()), 0, shape) for name, shape in shapes.items()}
    read_parts(checkpoint, {part: flat})
    # Only these sections of an older config have to be valid.
    config = validate({key: record["config"].get(key, {}) for key in ("model", "reduction")})
    _write_weights(
        target, {name: flat[name].values.view(shape) for name, shape in shapes.items()}, config, record["tied"]
    )


def to_deepspeed(checkpoint: Path, target: Path, *, stage: Literal[0, 1, 2, 3], world: World) -> None:
    """Writes a folder that DeepSpeed's `load_checkpoint` reads, at this world size. Collective.

    Raises:
        UserError: the checkpoint cannot be read, or its optimizer does not run at this stage.
    """
    config = validate(read_record(checkpoint)["config"])
    settings = DeepSpeedSettings(stage=stage)
    with naming_settings(_KEYS):
        check_optimizer(config.optimizer, settings.update_scope(world))
    model = _model_of(config)
    spec = EngineSpec(
        world=world,
        blocks=transformer_blocks(model),
        optimizer=partial(build_optimizer, config=config.optimizer),
        micro_batch=config.train.micro_batch,
        accumulation=1,
        precision="fp32",
    )
    engine: Any = settings.build(model, spec)
    state = restore(checkpoint, engine, None)
    engine.save_native(target, f"global_step{state.step}", state.step)


def from_deepspeed(source: Path, config: Config) -> DeepSpeedCheckpoint:
    """Reads what a DeepSpeed run of this config's model and optimizer saved.

    Raises:
        UserError: it cannot be read, or belongs to another model.
    """
    model = _model_of(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with naming_settings(_KEYS):
        groups = build_optimizer(model, config.optimizer).param_groups
    order = [names[id(parameter)] for group in groups for parameter in group["params"]]
    native = read_deepspeed(source, order, set().union(*groups))
    own = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in sorted(own.keys() | native.shapes.keys()):
        there, here = native.shapes.get(name), own.get(name)
        if there != here:
            shown = [list(shape) if shape else "not" for shape in (there, here)]
            raise UserError(
                f"{source}: belongs to another model ({name} is {shown[0]} there, {shown[1]} in the config)"
            )
    return native


def native_to_checkpoint(native: DeepSpeedCheckpoint, run_folder: Path, config: Config) -> Path:
    """Writes it as the checkpoint of a run that training resumes from.

    Raises:
        UserError: the run folder contains checkpoints, or cannot be written.
    """
    folder = run_folder / "checkpoints"
    if list_checkpoints(folder):
        raise UserError(f"{folder}: contains checkpoints; choose another run folder")

    def whole(tensors: Mapping[str, Tensor]) -> dict[str, TensorSlice]:
        return {name: TensorSlice(values, 0, native.shapes[name]) for name, values in tensors.items()}

    model = _model_of(config)
    optimizer = OptimizerState(
        type(build_optimizer(model, config.optimizer)).__name__,
        {name: whole(tensors) for name, tensors in native.tensors.items()},
        native.scalars,
    )
    parts = {"weights": whole(native.weights)}
    parts |= {f"optimizer.{name}": dict(slices) for name, slices in optimizer.tensors.items()}
    record = {
        "state": asdict(RunState(step=native.step)),
        "score": None,
        "optimizer": to_record(optimizer, native.shapes),
        "loss_scale": asdict(LossScale()),
        "config": config.model_dump(mode="json"),
        "data": None,  # its images came in another order
        "tensors": {name: list(shape) for name, shape in native.shapes.items()},
        "parts": sorted(parts),
        "tied": tied_names(model),
        "world_size": 1,
        "versions": versions(),
    }
    one_rank = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))
    slices = {f"{part}.{name}": own for part, held in parts.items() for name, own in held.items()}
    Saver(folder, one_rank, CheckpointConfig()).write(native.step, slices, record)
    return checkpoint_path(folder, native.step)


def native_to_weights(native: DeepSpeedCheckpoint, target: Path, config: Config) -> None:
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
