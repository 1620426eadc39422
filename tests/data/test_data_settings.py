"""Rooms name their own arguments; `training.run` names the config keys that filled them."""

import json

import pytest

from scalevit.data.faults import Fault, FaultLog
from scalevit.data.loading.chunk_cache import ChunkCache
from scalevit.data.loading.stream_loader import StreamLoader
from scalevit.data.order.batching import Split
from scalevit.data.shards.discovery import find_shards
from scalevit.data.shards.index import load_index
from scalevit.data.transforms.base import TrainingAugmentation
from scalevit.data.transforms.mixing import BatchMixing
from scalevit.data.transforms.timm_pipeline import TimmTraining
from scalevit.errors import UserError
from scalevit.training.setting_keys import naming_data_settings


def cache_in_a_file(folder):
    (folder / "file").write_text("")
    ChunkCache(str(folder / "file"), "set")


def too_many_faults(folder):
    FaultLog(folder / "faults.jsonl", limit=1).add([Fault("a", key, 0, "bad") for key in "xy"])


def mix_in_odd_groups(folder):
    BatchMixing(mixup=1, cutmix=0, probability=1, group=3)


def stream_with(**place):
    StreamLoader("pipe:cat a.tar", None, samples=1, num_classes=1, global_batch=1, micro_batch=1, **place)


@pytest.mark.parametrize(
    ("mistake", "key", "value"),
    [
        (lambda folder: Split(12, 13, 4), "train.global_batch", 12),
        (lambda folder: stream_with(world_size=2), "train.global_batch", 1),
        (mix_in_odd_groups, "data.augmentation.mixing_group", 3),
        (lambda folder: TimmTraining(TrainingAugmentation(image_size=8, mean=(0, 0, 0), auto_augment="rand-x9")),
         "data.augmentation.auto_augment", "rand-x9"),
        (cache_in_a_file, "data.cache", None),
        (too_many_faults, "data.max_faults", 1),
        (lambda folder: stream_with(workers=2), "data.workers", 2),
    ],
)  # fmt: skip
def test_config_keys_are_named(tmp_path, mistake, key, value):
    with pytest.raises(UserError) as caught, naming_data_settings():
        mistake(tmp_path)
    assert str(caught.value).startswith(f"config: {key} = {'' if value is None else json.dumps(value)}")
    assert "\n" not in str(caught.value)


def test_the_number_of_classes_is_named_with_the_sample(shards):
    message = r"^config: model\.num_classes = 2: .*\.tar, key .*label 2 is not in 0\.\.1"
    with pytest.raises(UserError, match=message), naming_data_settings():
        load_index(shards).check_labels(2)


def test_shards_that_can_only_be_streamed_come_with_the_setting():
    message = r"^shards at pipe:cat a\.tar: .*: set data\.stream_samples_per_epoch$"
    with pytest.raises(UserError, match=message), naming_data_settings():
        find_shards("pipe:cat a.tar")
