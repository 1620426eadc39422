"""`train.micro_batch = "auto"`: the largest micro-batch that fits on every rank, found once per run.

The planner's estimate is tried in one step on random images, and halved as long as memory does not suffice. Results do
not depend on the micro-batch, so nothing but speed and memory does.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from scalevit.config.training import TrainConfig
from scalevit.config.tree import Config
from scalevit.data.order.batching import Split
from scalevit.data.transforms.mixing import MixedLabels
from scalevit.distributed import World
from scalevit.engines.base import Engine
from scalevit.errors import UserError
from scalevit.models.dropout import RowKeys
from scalevit.planning.estimate import largest_micro_batch
from scalevit.runs.folder import RunFolder
from scalevit.training.ema import Ema
from scalevit.training.engine_builder import EngineBuilder
from scalevit.training.optimizers import state_tensors
from scalevit.training.tasks.base import DeviceBatch, TaskRunner

CPU_MICRO_BATCH = 64
"""On a CPU, memory is no limit and larger ones are not faster."""
# Of the free memory; the rest is for the communication library and fragmentation.
_USABLE = 0.92
TRAINING_KNOBS = (
    "lower train.micro_batch, set train.activation_checkpointing=true or kernels.save=lean, lower evaluation.batch, or "
    "shard more (engine.name=fsdp, engine.stage=3)"
)
"""What a user can change where the memory of a GPU does not suffice for training."""


def first_micro_batch(train: TrainConfig) -> int:
    """The micro-batch as configured; for "auto" that of a CPU, which `find_micro_batch` replaces on a GPU."""
    return CPU_MICRO_BATCH if train.micro_batch == "auto" else train.micro_batch


def micro_batch_of_run(config: Config, world: World, build_engine: EngineBuilder, folder: RunFolder) -> int:
    """As `find_micro_batch`, but a run that is resumed under the same conditions takes what it found before.

    Conditions are the number and kind of devices, the model and all that needs memory. Collective.

    Raises:
        UserError: not even one image fits, or the folder cannot be written.
    """
    if config.train.micro_batch != "auto":
        return config.train.micro_batch
    conditions = _conditions(config, world)
    size = world.from_first(folder.read_micro_batch(conditions) if world.is_first else None)
    if size is None:
        size = find_micro_batch(config, world, build_engine)
        with world.collective_errors():
            folder.write_micro_batch(conditions, size)
    return int(size)


def find_micro_batch(config: Config, world: World, build_engine: EngineBuilder) -> int:
    """The micro-batch as configured, or the largest that fits on every rank. Collective.

    Raises:
        UserError: not even one image fits.
    """
    free = world.free_memory_bytes()
    if config.train.micro_batch != "auto" or free is None:
        return first_micro_batch(config.train)
    guess = largest_micro_batch(
        config,
        ranks=world.size,
        memory_bytes=_USABLE * min(world.gather([free])),
        optimizer_tensors=len(state_tensors(config.optimizer.name, config.optimizer.args)),
    )
    found = largest_that_fits(guess, lambda size: _fits(size, config, world, build_engine))
    if world.is_first:
        print(f"train.micro_batch = auto: {found} images per forward pass (estimated: {guess})", flush=True)
    return found


def largest_that_fits(guess: int, fits: Callable[[int], bool]) -> int:
    """The guess, or half of it, a quarter, ...: the first that fits.

    Raises:
        UserError: not even one image does.
    """
    size = guess
    while not fits(size):
        if size == 1:
            raise UserError(f"out of memory with one image per forward pass: {TRAINING_KNOBS}")
        size //= 2
    return size


@contextmanager
def naming_out_of_memory(images: int, knobs: str) -> Iterator[None]:
    """Turns a GPU's lack of memory into one line that names what can be changed.

    Args:
        images: of a forward pass.
        knobs: the settings that need less memory.

    Raises:
        UserError: memory did not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory with {images} images per forward pass: {knobs}") from error


def _conditions(config: Config, world: World) -> dict[str, Any]:
    """What the largest micro-batch depends on."""
    own = config.model_dump(mode="json")
    sections = ("model", "reduction", "kernels", "task", "optimizer", "ema", "evaluation", "engine")
    train = ("global_batch", "precision", "channels_last", "activation_checkpointing", "compile", "compile_mode")
    return {
        "ranks": world.size,
        "device": world.device_name,
        **{key: own[key] for key in sections},
        "views": config.data.augmentation.splits,
        "largest_image": config.largest_training_image,
        "train": {key: own["train"][key] for key in train},
    }


def _fits(size: int, config: Config, world: World, build_engine: EngineBuilder) -> bool:
    """Whether a trial step fits on every rank. Collective."""
    split = Split(config.train.global_batch, world.size, size)
    engine: Engine | None = None
    try:
        engine = build_engine(micro_batch=split.size, accumulation=split.accumulation)
        _trial_step(engine, build_engine.task, config, split)
        short = False
    except torch.OutOfMemoryError:
        short = True
    if engine is not None:
        engine.close()
    del engine
    gc.collect()  # engines hang in cycles of hooks
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return not world.any(short)


def _trial_step(engine: Engine, task: TaskRunner, config: Config, split: Split) -> None:
    """All that needs memory in a run: two micro-batches if a step has more than one, optimizer, EMA, evaluation."""
    device, channels = engine.world.device, config.model.in_chans
    side = config.largest_training_image
    ema = Ema.from_config(config.ema, engine)
    keys = RowKeys(engine.module)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    engine.train()
    count, views = min(2, split.accumulation), config.data.augmentation.splits or 1
    size = views * split.size
    for index in range(count):
        images = torch.rand(size, channels, side, side, device=device).contiguous(memory_format=layout)
        labels = torch.zeros(size, dtype=torch.int64, device=device)
        mixed = MixedLabels(labels, labels, torch.ones(size, dtype=torch.float64, device=device), views)
        batch = DeviceBatch(images, mixed, torch.ones(size, device=device), step=0)
        keys.set(config.seed, 0, np.arange(size), device)
        for number in range(task.passes):
            total = task.loss(engine.forward, batch, number).total / split.global_batch
            engine.backward(total, last=index == count - 1 and number == task.passes - 1)
    engine.step(config.peak_lr)
    if ema is not None:
        ema.update(engine.local_parameters(), step=1)
    engine.eval()
    with torch.no_grad():
        side = config.model.image_size
        images = torch.rand(config.evaluation.batch, channels, side, side, device=device)
        images = images.contiguous(memory_format=layout)
        with config.task.forms(engine.module)[""]():
            engine.forward(images)
