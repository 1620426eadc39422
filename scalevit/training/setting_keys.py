"""Which config key fills which argument of a room: rooms name their own arguments in a `SettingError`.

The only such table. Trackers are not in it: their arguments are the keys of their section.
"""

DATA_KEYS = {
    "global_batch": "train.global_batch",
    "micro_batch": "train.micro_batch",
    "repeats": "data.augmentation.aug_repeats",
    "auto_augment": "data.augmentation.auto_augment",
    "num_classes": "model.num_classes",
    "image_size": "model.image_size",
    "batch": "evaluation.batch",
    "label_key": "data.label_key",
    "workers": "data.workers",
    "cache": "data.cache",
    "cache_bytes": "data.cache_gb",
    "samples": "data.stream_samples_per_epoch",
    "limit": "data.max_faults",
}
"""Arguments of `scalevit.data`, and of what `open_data` checks itself."""
