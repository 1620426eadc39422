"""From a config to the parts of a run: its data, and what its engine is built from."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import nn

from scalevit.config import Config
from scalevit.data import (
    Batching,
    EvaluationLoader,
    Index,
    Mix,
    Order,
    ShardDataset,
    TrainLoader,
    ensure_digits,
    evaluation_transform,
    load_index,
    training_transform,
)
from scalevit.engines import Setup, World
from scalevit.errors import UserError
from scalevit.models import mlp_blocks
from scalevit.optim import build_optimizer


def resolve_normalisation(config: Config) -> Config:
    """The config with the timm model's own normalisation where it leaves it open, so that what is written says all."""
    data = config.data
    own: Any = timm.get_pretrained_cfg(config.model.name, allow_unregistered=True) or timm.models.PretrainedCfg()
    filled = data.model_copy(
        update={
            "mean": data.mean or own.mean,
            "std": data.std or own.std,
            "crop_pct": data.crop_pct or own.crop_pct,
        }
    )
    return config.model_copy(update={"data": filled})


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    train: TrainLoader
    evaluation: EvaluationLoader
    mix: Mix


def open_data(config: Config, world: World) -> Data:
    """Finds shards, checks labels and batch sizes, and lays out the order. Needs no process group.

    Raises:
        UserError: shards are missing or damaged, a label is out of range, or the ranks cannot share a batch.
    """
    augmentation = config.data.augmentation
    return Data(
        train=_open_training(config, world),
        evaluation=open_evaluation(config, world),
        mix=Mix(
            mixup=augmentation.mixup,
            cutmix=augmentation.cutmix,
            probability=augmentation.mix_probability,
            label_smoothing=config.train.label_smoothing,
            num_classes=config.model.num_classes,
        ),
    )


def _open_training(config: Config, world: World) -> TrainLoader:
    augmentation, train = config.data.augmentation, config.train
    transform = training_transform(
        **_pixels(config),
        crop_scale=augmentation.crop_scale,
        crop_ratio=augmentation.crop_ratio,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=augmentation.interpolation,
        random_erasing=augmentation.random_erasing,
    )
    dataset = ShardDataset(_open_index(config, config.data.train), transform, seed=config.seed)
    if train.global_batch > len(dataset):
        raise UserError(f"train.global_batch = {train.global_batch} is more than the {len(dataset)} training images")
    return TrainLoader(
        dataset,
        Order(len(dataset), config.seed),
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        repeats=augmentation.repeats,
        **_place(config, world),
    )


def open_evaluation(config: Config, world: World) -> EvaluationLoader:
    """The validation images alone.

    Raises:
        UserError: as `open_data`.
    """
    assert config.data.crop_pct is not None, "see resolve_normalisation"
    transform = evaluation_transform(**_pixels(config), crop_pct=config.data.crop_pct)
    dataset = ShardDataset(_open_index(config, config.data.validation), transform)
    return EvaluationLoader(dataset, batch=config.evaluation.batch, **_place(config, world))


def _open_index(config: Config, path: str) -> Index:
    if config.data.embedded == "digits":
        for folder in (config.data.train, config.data.validation):
            if Path(folder).exists() and not Path(folder).is_dir():
                raise UserError(f"data.embedded = 'digits': {folder} is no folder")
        ensure_digits(config.data.train, config.data.validation)
    index = load_index(path)
    index.check_labels(config.model.num_classes)
    return index


def _pixels(config: Config) -> dict[str, Any]:
    return {"image_size": config.model.image_size, "mean": config.data.mean, "std": config.data.std}


def _place(config: Config, world: World) -> dict[str, Any]:
    """Where a loader stands among its peers."""
    return {
        "rank": world.rank,
        "world_size": world.size,
        "workers": config.data.workers,
        "pin_memory": world.device.type == "cuda",
    }


def engine_setup(config: Config, world: World, model: nn.Module) -> Setup:
    """What an engine is built from, besides the model and its own section of the config."""
    return Setup(
        world=world,
        blocks=mlp_blocks(model),
        optimizer=partial(build_optimizer, config=config.optimizer),
        micro_batch=config.train.micro_batch,
        accumulation=Batching(config.train.global_batch, config.train.micro_batch).accumulation(world.size),
        precision=config.train.precision,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        activation_checkpointing=config.train.activation_checkpointing,
    )
