"""From a config to the parts of a run: its data, and what its engine is built from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
from torch import nn

from scalevit.config.tree import SECTIONS, Config
from scalevit.data.builtin import ensure_digits
from scalevit.data.faults import Fault
from scalevit.data.loading.base import TrainingBatches
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.evaluation_loader import EvaluationLoader
from scalevit.data.loading.readers import open_reader
from scalevit.data.loading.stream_loader import StreamLoader
from scalevit.data.loading.train_loader import TrainLoader
from scalevit.data.order.batching import BatchLayout, order_rank
from scalevit.data.order.shuffle import Order
from scalevit.data.shards.index import load_index
from scalevit.data.storage.paths import StreamOnlyError
from scalevit.data.transforms.device import DeviceTransform
from scalevit.data.transforms.fast import FastEvaluation, FastTraining
from scalevit.data.transforms.mixing import BatchMixing
from scalevit.data.transforms.timm_pipeline import evaluation_transform, training_transform
from scalevit.distributed import World
from scalevit.engines.base import Engine, Setup
from scalevit.engines.factory import build_engine
from scalevit.errors import UserError, naming_settings
from scalevit.models.build import build_model
from scalevit.models.meta_init import initial_values
from scalevit.models.mlps import transformer_blocks
from scalevit.training.optimizers import build_optimizer

DATA_KEYS = {
    "global_batch": "train.global_batch",
    "micro_batch": "train.micro_batch",
    "repeats": "data.augmentation.aug_repeats",
    "workers": "data.workers",
    "auto_augment": "data.augmentation.auto_augment",
    "num_classes": "model.num_classes",
    "cache": "data.cache",
    "limit": "data.max_faults",
}
"""Config keys by the names of the arguments of `scalevit.data` that they fill."""


@contextmanager
def naming_data_settings() -> Iterator[None]:
    """Names config keys in the errors of `scalevit.data`.

    Raises:
        UserError: a setting that data refuse, or shards that can only be streamed.
    """
    with naming_settings(DATA_KEYS):
        try:
            yield
        except StreamOnlyError as error:
            raise UserError(f"{error}: set data.stream_samples_per_epoch") from error


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

    train: TrainingBatches
    evaluation: EvaluationLoader
    mix: BatchMixing

    @property
    def index_faults(self) -> list[Fault]:
        """Samples that the indexes leave out."""
        return [*self.train.index_faults, *self.evaluation.dataset.index.faults]


def open_data(config: Config, world: World) -> Data:
    """Finds shards, checks labels and batch sizes, and lays out the order. Needs no process group.

    Raises:
        UserError: shards are missing or damaged, a label is out of range, or the ranks cannot share a batch.
    """
    augmentation = config.data.augmentation
    with naming_data_settings():
        train = _open_training(config, world)
    mix = BatchMixing(mixup=augmentation.mixup, cutmix=augmentation.cutmix, probability=augmentation.mixup_prob)
    return Data(train=train, evaluation=open_evaluation(config, world), mix=mix)


def _open_training(config: Config, world: World) -> TrainingBatches:
    data, train = config.data, config.train
    sizes: dict[str, Any] = {"global_batch": train.global_batch, "micro_batch": train.micro_batch}
    finish = DeviceTransform(**_normalisation(config), random_erasing=data.augmentation.random_erasing)
    place = _place(config, world, finish)
    if data.stream_samples_per_epoch is None:
        dataset = _open_dataset(config, data.train, _training_transform(config), seed=config.seed)
        _check_size(train.global_batch, len(dataset))
        order = Order(len(dataset), config.seed)
        return TrainLoader(dataset, order, **sizes, repeats=data.augmentation.aug_repeats, **place)
    if data.augmentation.aug_repeats > 1:
        raise UserError(
            "data.stream_samples_per_epoch needs data.augmentation.aug_repeats = 1: a stream shows each image once"
        )
    _check_size(train.global_batch, data.stream_samples_per_epoch)
    return StreamLoader(
        data.train,
        _training_transform(config),
        samples=data.stream_samples_per_epoch,
        num_classes=config.model.num_classes,
        seed=config.seed,
        label_key=data.label_key,
        **sizes,
        **place,
    )


def _check_size(global_batch: int, samples: int) -> None:
    if global_batch > samples:
        raise UserError(f"train.global_batch = {global_batch} is more than the {samples} training images")


def open_evaluation(config: Config, world: World) -> EvaluationLoader:
    """The validation images alone.

    Raises:
        UserError: as `open_data`.
    """
    with naming_data_settings():
        dataset = _open_dataset(config, config.data.validation, _evaluation_transform(config))
    place = _place(config, world, DeviceTransform(**_normalisation(config)))
    return EvaluationLoader(dataset, batch=config.evaluation.batch, **place)


def _open_dataset(config: Config, path: str, transform: Any, seed: int = 0) -> ShardDataset:
    data = config.data
    if data.builtin == "digits":
        ensure_digits(data.train, data.validation)
    index = load_index(path, label_key=data.label_key)
    index.check_labels(config.model.num_classes)
    cache_bytes = None if data.cache_gb is None else int(data.cache_gb * 1e9)
    return ShardDataset(index, transform, seed, open_reader(index, cache=data.cache, cache_bytes=cache_bytes))


def _training_transform(config: Config) -> Any:
    augmentation = config.data.augmentation
    settings: dict[str, Any] = {
        "image_size": config.model.image_size,
        "mean": _normalisation(config)["mean"],
        "crop_scale": augmentation.crop_scale,
        "crop_ratio": augmentation.crop_ratio,
        "hflip": augmentation.hflip,
        "color_jitter": augmentation.color_jitter,
        "auto_augment": augmentation.auto_augment,
        "interpolation": augmentation.interpolation,
    }
    return FastTraining(**settings) if config.data.transforms == "fast" else training_transform(**settings)


def _evaluation_transform(config: Config) -> Any:
    assert config.data.crop_pct is not None, "see resolve_normalisation"
    settings: dict[str, Any] = {"image_size": config.model.image_size, "crop_pct": config.data.crop_pct}
    return FastEvaluation(**settings) if config.data.transforms == "fast" else evaluation_transform(**settings)


def _normalisation(config: Config) -> dict[str, Any]:
    return {"mean": config.data.mean, "std": config.data.std}


def _place(config: Config, world: World, finish: DeviceTransform) -> dict[str, Any]:
    """Where a loader stands among its peers, and what it leaves to the device."""
    return {
        # So that the ranks of a node read the same chunks, whatever their numbers.
        "rank": order_rank(world.rank, world.size, world.local_size),
        "world_size": world.size,
        "workers": config.data.workers,
        "pin_memory": world.device.type == "cuda",
        "finish": finish,
    }


def prepare_engine(config: Config, world: World) -> Callable[[], Engine]:
    """Builds the config's model, and returns what shards it: to be called once, inside the process group.

    Raises:
        UserError: the model or its batches cannot be built, while there is no process group yet.
    """
    device = "meta" if config.train.meta_init else "cpu"
    with naming_settings(SECTIONS):
        model = build_model(
            config.model,
            config.reduction,
            seed=config.seed,
            device=device,
            kernels=config.kernels,
            run_device=world.device,
        )
    with naming_data_settings():
        setup = _engine_setup(config, world, model)
    return partial(build_engine, model, setup, config.engine)


def _engine_setup(config: Config, world: World, model: nn.Module) -> Setup:
    """What an engine is built from, besides the model and its own section of the config."""
    return Setup(
        world=world,
        blocks=transformer_blocks(model),
        optimizer=partial(build_optimizer, config=config.optimizer),
        micro_batch=config.train.micro_batch,
        accumulation=BatchLayout(config.train.global_batch, config.train.micro_batch).accumulation(world.size),
        precision=config.train.precision,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        activation_checkpointing=config.train.activation_checkpointing,
        compile="inductor" if config.train.compile else None,
        initial_values=partial(initial_values, config.model, config.reduction, seed=config.seed)
        if config.train.meta_init
        else None,
    )
