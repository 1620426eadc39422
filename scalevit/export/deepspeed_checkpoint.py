"""Runs as DeepSpeed's own checkpoints, and back to a run folder. Must not know DeepSpeed's files: its engine does.

No exporter of a model: optimizer state and step are converted too, for the ranks and the ZeRO stage that will resume.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalevit.checkpoint.folder import checkpoint_path, list_checkpoints, read_record
from scalevit.checkpoint.optimizer_record import to_record
from scalevit.checkpoint.restore import restore
from scalevit.checkpoint.run_state import RunState
from scalevit.checkpoint.saver import Saver, versions
from scalevit.config.loading import validate
from scalevit.config.training import CheckpointConfig
from scalevit.config.tree import Config
from scalevit.distributed import World
from scalevit.engines.base import EngineSpec
from scalevit.engines.deepspeed.checkpoints import DeepSpeedCheckpoint, read_deepspeed
from scalevit.engines.deepspeed.settings import DeepSpeedSettings, Stage
from scalevit.engines.precision import LossScale
from scalevit.engines.state import OptimizerState, TensorSlice
from scalevit.errors import UserError, naming_settings
from scalevit.export.checkpoint_model import initial_model
from scalevit.models.mlps import transformer_blocks
from scalevit.training.optimizers import build_optimizer, check_optimizer
from scalevit.training.setting_keys import OPTIMIZATION_KEYS
from scalevit.training.tasks.base import without_own
from scalevit.tying import tied_names


def write_deepspeed(checkpoint: Path, target: Path, *, stage: Stage, world: World) -> None:
    """Writes a folder that DeepSpeed's `load_checkpoint` reads, at this world size. Collective.

    Raises:
        UserError: the checkpoint cannot be read, its optimizer does not run at this stage, or its task trains
            parameters of its own.
    """
    record = read_record(checkpoint)
    if own := sorted(record["tensors"].keys() - without_own(record["tensors"]).keys()):
        raise UserError(f"checkpoint {checkpoint}: its task trains {own[0]}, which DeepSpeed's format has no place for")
    config = validate(record["config"])
    settings = DeepSpeedSettings(stage=stage)
    with naming_settings(OPTIMIZATION_KEYS):
        check_optimizer(config.optimizer, settings.update_scope(world))
    model = initial_model(config)
    spec = EngineSpec(
        world=world,
        blocks=transformer_blocks(model),
        optimizer=partial(build_optimizer, config=config.optimizer),
        micro_batch=1,
        accumulation=1,
        precision="fp32",
    )
    engine: Any = settings.build(model, spec)
    state = restore(checkpoint, engine, None)
    engine.save_native(target, f"global_step{state.step}", state.step)


def read_deepspeed_run(source: Path, config: Config) -> DeepSpeedCheckpoint:
    """Reads what a DeepSpeed run of this config's model and optimizer saved.

    Raises:
        UserError: it cannot be read, or belongs to another model.
    """
    model = initial_model(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with naming_settings(OPTIMIZATION_KEYS):
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


def write_checkpoint(native: DeepSpeedCheckpoint, run_folder: Path, config: Config) -> Path:
    """Writes it as the checkpoint of a run that training resumes from.

    Raises:
        UserError: the run folder contains checkpoints, or cannot be written.
    """
    folder = run_folder / "checkpoints"
    if list_checkpoints(folder):
        raise UserError(f"{folder}: contains checkpoints; choose another run folder")

    def whole(tensors: Mapping[str, Tensor]) -> dict[str, TensorSlice]:
        return {name: TensorSlice(values, 0, native.shapes[name]) for name, values in tensors.items()}

    model = initial_model(config)
    with naming_settings(OPTIMIZATION_KEYS):
        optimizer_class = type(build_optimizer(model, config.optimizer))
    optimizer = OptimizerState(
        optimizer_class.__name__,
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
