"""From a config to the parts of a run: its data, and what its engine is built from."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
from torch import nn

from scalevit.config import Config
from scalevit.data import (
    EvaluationLoader,
    FastEvaluation,
    FastTraining,
    Fault,
    Finish,
    Mix,
    Order,
    ShardDataset,
    StreamLoader,
    TrainLoader,
    ensure_digits,
    evaluation_transform,
    load_index,
    open_reader,
    spread_rank,
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

    train: TrainLoader | StreamLoader
    evaluation: EvaluationLoader
    mix: Mix
    finish: Finish
    """Of training batches, on the device and before the mix."""
    finish_evaluation: Finish

    @property
    def index_faults(self) -> list[Fault]:
        """Samples that the indexes leave out."""
        return [*self.train.index_faults, *self.evaluation.dataset.index.faults]


def open_data(config: Config, world: World) -> Data:
    """Finds shards, checks labels and batch sizes, and lays out the order. Needs no process group.

    Raises:
        UserError: shards are missing or damaged, a label is out of range, or the ranks cannot share a batch.
    """
    data, train, augmentation = config.data, config.train, config.data.augmentation
    if data.embedded == "digits":
        ensure_digits(data.train, data.validation)
    assert data.crop_pct is not None, "see resolve_normalisation"
    place: dict[str, Any] = {
        "rank": spread_rank(world.rank, world.size, world.local_size),
        "world_size": world.size,
        "workers": data.workers,
        "pin_memory": world.device.type == "cuda",
    }
    training = _train_loader(config, place)
    validation = _dataset(config, data.validation, _evaluation_transform(config), seed=0)
    return Data(
        train=training,
        evaluation=EvaluationLoader(validation, batch=config.evaluation.batch, **place),
        mix=Mix(
            mixup=augmentation.mixup,
            cutmix=augmentation.cutmix,
            probability=augmentation.mix_probability,
            label_smoothing=train.label_smoothing,
            num_classes=config.model.num_classes,
        ),
        finish=Finish(**_normalisation(config), random_erasing=augmentation.random_erasing),
        finish_evaluation=Finish(**_normalisation(config)),
    )


def _dataset(config: Config, pattern: str, transform: Any, seed: int) -> ShardDataset:
    data = config.data
    index = load_index(pattern, label_key=data.label_key)
    index.check_labels(config.model.num_classes)
    cache_bytes = None if data.cache_gb is None else int(data.cache_gb * 1e9)
    return ShardDataset(index, transform, seed, open_reader(index, cache=data.cache, cache_bytes=cache_bytes))


def _train_loader(config: Config, place: dict[str, Any]) -> TrainLoader | StreamLoader:
    data, train, transform = config.data, config.train, _training_transform(config)
    sizes: dict[str, Any] = {"global_batch": train.global_batch, "micro_batch": train.micro_batch}
    if data.stream_samples is None:
        dataset = _dataset(config, data.train, transform, config.seed)
        order = Order(len(dataset), config.seed)
        return TrainLoader(dataset, order, **sizes, repeats=data.augmentation.repeats, **place)
    if data.augmentation.repeats > 1:
        raise UserError("data.stream_samples needs data.augmentation.repeats = 1: a stream shows each image once")
    return StreamLoader(
        data.train,
        transform,
        samples=data.stream_samples,
        num_classes=config.model.num_classes,
        seed=config.seed,
        label_key=data.label_key,
        **sizes,
        **place,
    )


def _training_transform(config: Config) -> Any:
    augmentation, fast = config.data.augmentation, config.data.transforms == "fast"
    settings: dict[str, Any] = {
        "image_size": config.model.image_size,
        "crop_scale": augmentation.crop_scale,
        "crop_ratio": augmentation.crop_ratio,
        "hflip": augmentation.hflip,
        "color_jitter": augmentation.color_jitter,
        "auto_augment": augmentation.auto_augment,
        "interpolation": augmentation.interpolation,
    }
    if fast:
        return FastTraining(**settings, mean=_normalisation(config)["mean"])
    return training_transform(**settings, **_normalisation(config), random_erasing=augmentation.random_erasing)


def _evaluation_transform(config: Config) -> Any:
    assert config.data.crop_pct is not None, "see resolve_normalisation"
    settings: dict[str, Any] = {"image_size": config.model.image_size, "crop_pct": config.data.crop_pct}
    if config.data.transforms == "fast":
        return FastEvaluation(**settings)
    return evaluation_transform(**settings, **_normalisation(config))


def _normalisation(config: Config) -> dict[str, Any]:
    return {"mean": config.data.mean, "std": config.data.std}


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
