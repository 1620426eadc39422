"""From a config to the parts of a run: its data, and what its engine is built from."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
from torch import nn

from scalevit.config import Config
from scalevit.data import (
    EvaluationLoader,
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
    data, train, augmentation = config.data, config.train, config.data.augmentation
    if data.embedded == "digits":
        ensure_digits(data.train, data.validation)
    assert data.crop_pct is not None, "see resolve_normalisation"
    common: dict[str, Any] = {"image_size": config.model.image_size, "mean": data.mean, "std": data.std}
    transform = training_transform(
        **common,
        crop_scale=augmentation.crop_scale,
        crop_ratio=augmentation.crop_ratio,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=augmentation.interpolation,
        random_erasing=augmentation.random_erasing,
    )
    training = ShardDataset(load_index(data.train), transform, seed=config.seed)
    validation = ShardDataset(load_index(data.validation), evaluation_transform(**common, crop_pct=data.crop_pct))
    for dataset in (training, validation):
        dataset.index.check_labels(config.model.num_classes)
    place: dict[str, Any] = {
        "rank": world.rank,
        "world_size": world.size,
        "workers": data.workers,
        "pin_memory": world.device.type == "cuda",
    }
    return Data(
        train=TrainLoader(
            training,
            Order(len(training), config.seed),
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            repeats=augmentation.repeats,
            **place,
        ),
        evaluation=EvaluationLoader(validation, batch=config.evaluation.batch, **place),
        mix=Mix(
            mixup=augmentation.mixup,
            cutmix=augmentation.cutmix,
            probability=augmentation.mix_probability,
            label_smoothing=train.label_smoothing,
            num_classes=config.model.num_classes,
        ),
    )


def engine_setup(config: Config, world: World, model: nn.Module, data: Data) -> Setup:
    """What an engine is built from, besides the model and its own section of the config."""
    return Setup(
        world=world,
        blocks=mlp_blocks(model),
        optimizer=partial(build_optimizer, config=config.optimizer),
        micro_batch=config.train.micro_batch,
        accumulation=data.train.accumulation,
        precision=config.train.precision,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        activation_checkpointing=config.train.activation_checkpointing,
    )
