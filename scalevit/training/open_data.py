"""Opens the data of a run: from the config's sections to loaders. Knows the rooms of `data`; no process group."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

from scalevit.config.tree import Config
from scalevit.data.builtin import ensure_builtin
from scalevit.data.faults import Fault
from scalevit.data.loading.base import TrainingBatches
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.evaluation_loader import EvaluationLoader
from scalevit.data.loading.readers import open_reader
from scalevit.data.loading.stream_loader import StreamLoader
from scalevit.data.loading.train_loader import TrainLoader
from scalevit.data.order.image_sizes import ImageSizes
from scalevit.data.order.shuffle import Order
from scalevit.data.order.timm_order import TimmLayout, TimmOrder
from scalevit.data.shards.index import load_index
from scalevit.data.shards.labels import LabelFormat
from scalevit.data.shards.real_labels import read_real_labels
from scalevit.data.transforms.base import Channels, Colour, TrainingAugmentation, Transform
from scalevit.data.transforms.device import DeviceTransform
from scalevit.data.transforms.fast import FastEvaluation, FastTraining
from scalevit.data.transforms.grey import for_channels, in_grey
from scalevit.data.transforms.mixing import BatchMixing
from scalevit.data.transforms.timm_pipeline import TimmTraining, evaluation_transform
from scalevit.data.writing.sources.classes import read_class_map, read_class_names
from scalevit.distributed import World
from scalevit.errors import SettingError, UserError
from scalevit.training.micro_batch import first_micro_batch


@dataclass(frozen=True)
class RunData:
    """What a run reads."""

    train: TrainingBatches
    evaluation: EvaluationLoader
    mixing: BatchMixing
    num_classes: int
    """Of the model."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of labels 0..., where the training set has them; else the validation set's, if it has all."""
        validation = self.evaluation.dataset.index.classes
        whole = validation if validation is not None and len(validation) == self.num_classes else None
        return self.train.classes or whole

    @property
    def index_faults(self) -> list[Fault]:
        """Samples that the indexes leave out."""
        return [*self.train.index_faults, *self.evaluation.dataset.index.faults]


def open_data(config: Config, world: World) -> RunData:
    """Finds shards, checks labels and batch sizes, and lays out the order. Needs no process group.

    Raises:
        UserError: shards are missing or damaged.
        SettingError: a label is out of range, or the ranks cannot share a batch; see `setting_keys.DATA_KEYS`.
    """
    train = _open_training(config, world)
    return RunData(
        train=train,
        evaluation=open_evaluation(config, world, classes=train.classes),
        mixing=_mixing(config, train),
        num_classes=config.model.num_classes,
    )


def open_evaluation(config: Config, world: World, *, classes: Sequence[str] | None) -> EvaluationLoader:
    """The validation images only.

    Args:
        classes: names of the labels that the model was or will be trained with, if they are known. The validation set
            is numbered like them where it has names.

    Raises:
        UserError, SettingError: as `open_data`.
    """
    dataset, real = open_unaugmented(config, config.data.validation, classes=classes), config.evaluation.real_labels
    return EvaluationLoader(
        dataset,
        batch=config.evaluation.batch,
        real_labels=None if real is None else read_real_labels(dataset.index, real, config.model.num_classes),
        **_placement(config, world),
        finish=device_transform_of(config),
    )


def open_unaugmented(config: Config, path: str, *, classes: Sequence[str] | None = None) -> ShardDataset:
    """The images of any shards as an evaluation sees them, e.g. training images without augmentation.

    Args:
        path: `data.train` or `data.validation` of the config.
        classes: as for `open_evaluation`.

    Raises:
        UserError, SettingError: as `open_data`.
    """
    return _open_dataset(config, path, evaluation_transform_of(config), seed=config.seed, classes=classes)


def _open_training(config: Config, world: World) -> TrainingBatches:
    data, train = config.data, config.train
    finish = device_transform_of(config, erases=True)
    if data.stream_samples_per_epoch is None:
        dataset = _open_dataset(config, data.train, training_transform_of(config), seed=config.seed)
        _check_size(train.global_batch, len(dataset))
        layout = _timm_layout(config, len(dataset))
        image_sizes = image_sizes_of(config)
        return TrainLoader(
            dataset,
            Order(len(dataset), config.seed) if layout is None else TimmOrder(len(dataset)),
            global_batch=train.global_batch,
            micro_batch=first_micro_batch(train),
            repeats=data.augmentation.aug_repeats,
            layout=layout,
            **_placement(config, world),
            finish=finish,
            image_sizes=image_sizes,
            by_size={side: training_transform_of(config, side) for side in data.augmentation.image_sizes},
        )
    if data.augmentation.image_sizes:
        raise SettingError(
            "image_sizes", list(data.augmentation.image_sizes), "a stream has images of one size: leave them out"
        )
    if data.augmentation.aug_repeats > 1:
        raise SettingError("repeats", data.augmentation.aug_repeats, "must be 1: a stream shows each image once")
    if data.augmentation.repeat_order == "timm":
        raise SettingError("repeat_order", "timm", "a stream has an order of its own")
    if data.class_map is not None:
        raise SettingError("class_map", data.class_map, "labels of a stream stay as they are: write the shards again")
    _check_size(train.global_batch, data.stream_samples_per_epoch)
    return StreamLoader(
        data.train,
        training_transform_of(config),
        samples=data.stream_samples_per_epoch,
        num_classes=config.model.num_classes,
        seed=config.seed,
        labels=_label_format(config),
        exif_orientation=data.exif_orientation,
        global_batch=train.global_batch,
        micro_batch=first_micro_batch(train),
        **_placement(config, world),
        finish=finish,
    )


def _timm_layout(config: Config, samples: int) -> TimmLayout | None:
    augmentation = config.data.augmentation
    if augmentation.repeat_order != "timm":
        return None
    return TimmLayout(
        config.train.global_batch,
        augmentation.aug_repeats,
        samples,
        augmentation.mixing_group,
        augmentation.repeat_processes,
    )


def _check_size(global_batch: int, samples: int) -> None:
    if global_batch > samples:
        raise SettingError("global_batch", global_batch, f"must be at most the {samples} training images")


def _open_dataset(
    config: Config, path: str, transform: Transform, *, seed: int = 0, classes: Sequence[str] | None = None
) -> ShardDataset:
    data = config.data
    if data.builtin is not None:
        ensure_builtin(data.builtin, data.train, data.validation, data.builtin_files)
    index = load_index(path, labels=_label_format(config))
    if data.class_map is not None:
        with _file_of("class_map", data.class_map):
            class_map = read_class_map(data.class_map)
        index = index.relabelled(class_map, f"class map {data.class_map}")
    if classes is not None:
        index = index.numbered_as(classes)
    index.check_labels(config.model.num_classes)
    cache_bytes = None if data.cache_gb is None else int(data.cache_gb * 1e9)
    reader = open_reader(index, cache=data.cache, cache_bytes=cache_bytes)
    return ShardDataset(index, transform, seed, reader, exif_orientation=data.exif_orientation)


def _label_format(config: Config) -> LabelFormat:
    data, names = config.data, None
    if data.class_names is not None:
        with _file_of("class_names", data.class_names):
            names = tuple(read_class_names(data.class_names))
    return LabelFormat(data.label_key, names)


@contextmanager
def _file_of(argument: str, path: str) -> Iterator[None]:
    """Names the argument where the file that it names cannot be used."""
    try:
        yield
    except UserError as error:
        raise SettingError(argument, path, str(error).rpartition(f"{path}: ")[2]) from None


def image_sizes_of(config: Config) -> ImageSizes | None:
    """The sizes of the steps' images, where there are several."""
    augmentation = config.data.augmentation
    if not augmentation.image_sizes:
        return None
    return ImageSizes(
        augmentation.image_sizes,
        augmentation.image_size_probs,
        progressive=augmentation.image_size_schedule == "progressive",
        epochs=config.train.epochs,
        spread=augmentation.image_size_spread,
        random_mix=augmentation.image_size_random_mix,
        seed=config.seed,
    )


def training_transform_of(config: Config, image_size: int | None = None) -> Transform:
    """What becomes of a training image before it is on the device. The config has its model's defaults.

    Args:
        image_size: side in pixels; None: `model.image_size`.
    """
    augmentation = config.data.augmentation
    build = FastTraining if config.data.transforms == "fast" else TimmTraining
    settings = TrainingAugmentation(
        image_size=image_size or config.model.image_size,
        mean=_mean_colour(config),
        crop_mode=augmentation.crop_mode,
        crop_scale=augmentation.crop_scale,
        crop_ratio=augmentation.crop_ratio,
        hflip=augmentation.hflip,
        vflip=augmentation.vflip,
        color_jitter=augmentation.color_jitter,
        color_jitter_prob=augmentation.color_jitter_prob,
        grayscale_prob=augmentation.grayscale_prob,
        gaussian_blur_prob=augmentation.gaussian_blur_prob,
        auto_augment=augmentation.auto_augment,
        interpolation=augmentation.interpolation,
        splits=augmentation.splits,
    )
    return _in_channels(config, build(settings))


def evaluation_transform_of(config: Config) -> Transform:
    """Likewise for a validation image."""
    data = config.data
    assert data.crop_pct is not None, "see with_model_defaults"
    assert data.crop_mode is not None, "see with_model_defaults"
    assert data.interpolation is not None, "see with_model_defaults"
    build = FastEvaluation if data.transforms == "fast" else evaluation_transform
    transform = build(
        image_size=config.model.image_size,
        crop_pct=data.crop_pct,
        interpolation=data.interpolation,
        crop_mode=data.crop_mode,
        mean=_mean_colour(config),
    )
    return _in_channels(config, transform)


def _in_channels(config: Config, transform: Transform) -> Transform:
    return in_grey(transform) if config.model.in_chans == 1 else transform


def _mean_colour(config: Config) -> Colour:
    (first, *others), _ = normalisation_of(config)
    second, third = others or (first, first)
    return first, second, third


def normalisation_of(config: Config) -> tuple[Channels, Channels]:
    """Mean and standard deviation of the model's channels. The config has its model's defaults."""
    mean, std = config.data.mean, config.data.std
    assert mean is not None, "see with_model_defaults"
    assert std is not None, "see with_model_defaults"
    return for_channels(mean, config.model.in_chans), for_channels(std, config.model.in_chans)


def device_transform_of(config: Config, *, erases: bool = False) -> DeviceTransform:
    """What becomes of the results of both on the device.

    Args:
        erases: as in training.
    """
    mean, std = normalisation_of(config)
    if not erases:
        return DeviceTransform(mean=mean, std=std)
    augmentation = config.data.augmentation
    return DeviceTransform(
        mean=mean,
        std=std,
        random_erasing=augmentation.random_erasing,
        mode=augmentation.random_erasing_mode,
        count=augmentation.random_erasing_count,
        splits=augmentation.splits or 1,
        clean_split=augmentation.random_erasing_clean_split,
    )


def _mixing(config: Config, train: TrainingBatches) -> BatchMixing:
    augmentation = config.data.augmentation
    side = min(augmentation.image_sizes, default=config.model.image_size)
    minmax, epochs = augmentation.cutmix_minmax, augmentation.mixup_off_epoch
    if minmax is not None and int(side * minmax[0]) == int(side * minmax[1]):
        raise SettingError("cutmix_minmax", list(minmax), f"is less than one of {side} pixels")
    return BatchMixing(
        mixup=augmentation.mixup,
        cutmix=augmentation.cutmix,
        cutmix_minmax=minmax,
        probability=augmentation.mixup_prob,
        switch=augmentation.mixup_switch_prob,
        mode=augmentation.mixup_mode,
        group=augmentation.mixing_group,
        until_step=train.steps_in(epochs) if epochs else None,
        unnormalised=augmentation.erase == "after_mixing",
        seed=config.seed,
    )


class _Placement(TypedDict):
    """A loader's place among its peers."""

    rank: int
    world_size: int
    workers: int
    pin_memory: bool


def _placement(config: Config, world: World) -> _Placement:
    return {
        "rank": world.rank,
        "world_size": world.size,
        "workers": config.data.workers,
        "pin_memory": world.device.type == "cuda",
    }
