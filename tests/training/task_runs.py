"""Small runs in this process, for the tests of tasks, and micro-batches for their losses."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.data.order.batching import Split
from scalevit.data.transforms.mixing import BatchMixing, MixedLabels
from scalevit.distributed import World
from scalevit.engines.base import Engine
from scalevit.models.weights.write import write_weights
from scalevit.training.ema import Ema
from scalevit.training.run import prepare, prepare_evaluation, with_model_defaults
from scalevit.training.step import TrainingStep
from scalevit.training.tasks.base import DeviceBatch
from scalevit.training.tasks.classification import ClassificationRunner
from scalevit.tying import canonical_state, tied_names

AnyModel = TypeVar("AnyModel", bound=torch.nn.Module)
ALONE = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))
SETTINGS = [
    "data.workers=0",
    "data.augmentation.mixup=0.8",
    "model.kwargs.depth=2",
    "model.kwargs.embed_dim=48",
    "model.drop_path=0.1",
    "train.global_batch=12",
    "train.micro_batch=4",
    "train.log_every_steps=1",
    "train.checkpoint.every_epochs=50",
    "evaluation.batch=360",
    "schedule.warmup_epochs=0",
    "optimizer.lr=1e-2",  # so that a lost update or state would show
    "ema.decay=0.5",
    "engine.name=fsdp",  # DeepSpeed runs once per process
]


def config(*settings: str) -> Config:
    """The quickstart's, smaller, with the model's defaults filled in."""
    return with_model_defaults(load_config("quickstart", [*SETTINGS, *settings]))


def train(name: str, *settings: str, steps: int) -> Path:
    """Trains in the current folder, where the digits are; returns the run folder."""
    with one_thread():
        prepare(config(*settings, f"name={name}", f"train.max_steps={steps}")).train()
    return Path("runs") / name


def evaluate(of: Config) -> dict[str, float]:
    """Of `model.initial_weights`, with the data in the current folder."""
    with one_thread():
        return dict(prepare_evaluation(of).evaluate().metrics)


@contextmanager
def one_thread() -> Iterator[None]:
    """Tests share two cores, and two threads would wait for each other; the process keeps its allocator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scalevit.training.run.prepare_cpu", lambda **_: torch.set_num_threads(1))
        yield


def training_step(of: Config, engine: Engine, ema: Ema, mixing: BatchMixing, split: Split) -> TrainingStep:
    """That of a classification whose images are the model's input as they are."""
    return TrainingStep(
        engine,
        ClassificationRunner(of.loss),
        ema,
        transform=lambda images, keys: images,
        mixing=mixing,
        split=split,
        seed=of.seed,
        channels_last=of.train.channels_last,
    )


def write(path: Path, model: Any, of: Config) -> Path:
    """A weights file of a model, as a run writes it."""
    tensors = canonical_state(model)
    write_weights(path, tensors, model=of.model, reduction=of.reduction, tied=tied_names(model))
    return path


def spread(model: AnyModel) -> AnyModel:
    """Gives every parameter values that differ visibly: timm's initial ones leave logits and gradients near zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def micro_batch(rows: int = 5, *, padding: int = 0, classes: int = 10, side: int = 16) -> DeviceBatch:
    """Mixed images, of which the last ones only fill up the batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 3, side, side, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    weight = torch.from_numpy(np.linspace(0.3, 1.0, rows))
    kept = (torch.arange(rows) < rows - padding).float()
    return DeviceBatch(images, MixedLabels(labels, labels.flip(0), weight), kept, step=3)


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    """Of every parameter; those that the loss does not depend on are left out."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
