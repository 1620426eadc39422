"""Which config key fills which argument of a room: rooms name their own arguments in a `SettingError`.

The only such table, with `config.tree.SECTIONS` for rooms that are handed whole sections.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from scalevit.data.storage.paths import StreamOnlyError
from scalevit.errors import UserError, naming_settings
from scalevit.runs.trackers import TRACKERS

DATA_KEYS = {
    "global_batch": "train.global_batch",
    "micro_batch": "train.micro_batch",
    "repeats": "data.augmentation.aug_repeats",
    "repeat_order": "data.augmentation.repeat_order",
    "repeat_processes": "data.augmentation.repeat_processes",
    "mixing_group": "data.augmentation.mixing_group",
    "builtin_files": "data.builtin_files",
    "workers": "data.workers",
    "auto_augment": "data.augmentation.auto_augment",
    "gaussian_blur_prob": "data.augmentation.gaussian_blur_prob",
    "image_sizes": "data.augmentation.image_sizes",
    "cutmix_minmax": "data.augmentation.cutmix_minmax",
    "interpolation": "data.interpolation",
    "class_map": "data.class_map",
    "class_names": "data.class_names",
    "real_labels": "evaluation.real_labels",
    "num_classes": "model.num_classes",
    "cache": "data.cache",
    "limit": "data.max_faults",
}
"""Arguments of `scalevit.data`."""

TRACKER_KEYS = {part.kind(): f"tracking.{part.kind()}" for part in TRACKERS}
"""Sections of the trackers."""


@contextmanager
def naming_data_settings() -> Iterator[None]:
    """Names config keys in the errors of `scalevit.data`. Within `World.collective_errors`, not around it: what other
    ranks report has been turned into text.

    Raises:
        UserError: a setting that data refuse, or shards that can only be streamed.
    """
    with naming_settings(DATA_KEYS):
        try:
            yield
        except StreamOnlyError as error:
            raise UserError(f"{error}: set data.stream_samples_per_epoch") from error


OPTIMIZATION_KEYS = {
    "optimizer": "optimizer.name",
    "optimizer_args": "optimizer.args",
    "clip_mode": "optimizer.clip_mode",
    "frozen": "optimizer.frozen",
    "layer_decay": "optimizer.layer_decay",
    "schedule": "schedule.name",
    "schedule_args": "schedule.args",
}
"""Config keys by the names of the arguments of `training.optimizers` and `training.schedules` that they fill."""
