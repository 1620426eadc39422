"""Reassessed labels: found by the images' names, and counted as timm's RealLabelsImagenet does."""

import json

import numpy as np
import pytest
import torch
from timm.data.real_labels import RealLabelsImagenet

from scalevit.data.images import encode_png
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.evaluation_loader import EvaluationLoader
from scalevit.data.shards.index import load_index
from scalevit.data.shards.real_labels import read_real_labels
from scalevit.data.transforms.timm_pipeline import evaluation_transform
from scalevit.data.writing.writer import write_samples
from scalevit.distributed import World
from scalevit.errors import SettingError
from scalevit.training.evaluation import measure_within_limit

REAL = [[3], [], [1, 2], [0], [4, 5], [], [2], [6], [0, 1, 2], [3], [5]]


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    """Images 1 to 11 of "ImageNet", in another order; image n is grey with value 20 n."""
    folder = tmp_path_factory.mktemp("real") / "set"
    samples = [
        (
            f"{place:03}_ILSVRC2012_val_{number:08}",
            "png",
            encode_png(np.full((8, 8), 20 * number, np.uint8)),
            number % 7,
        )
        for place, number in enumerate((4, 1, 7, 2, 11, 3, 5, 10, 6, 9, 8))
    ]
    write_samples(samples, folder, shard_size=4)
    return ShardDataset(load_index(folder), evaluation_transform(image_size=8, crop_pct=1.0))


def write(folder, content):
    (folder / "real.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "real.json"


def forward(images):
    """Logits of 7 classes from an image's number."""
    numbers = (images.float().mean((1, 2, 3)) / 20).round()
    return torch.sin(numbers[:, None] * torch.arange(1, 8))


def test_accuracies_are_timms(validation, tmp_path):
    path = write(tmp_path, REAL)
    real = read_real_labels(validation.index, path, 7)
    loader = EvaluationLoader(validation, batch=4, real_labels=real)
    world = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))
    metrics = measure_within_limit(forward, world, loader, max_faults=0).metrics
    theirs = RealLabelsImagenet([f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 12)], real_json=str(path))
    theirs.add_result(forward(torch.arange(1, 12).view(-1, 1, 1, 1).expand(-1, 3, 8, 8) * 20))
    assert metrics["real_top1"] == pytest.approx(theirs.get_accuracy(1))
    assert metrics["real_top5"] == pytest.approx(theirs.get_accuracy(5))
    assert 0 < metrics["real_top1"] < metrics["real_top5"]
    assert {"top1", "top5", "loss"} < metrics.keys()


def test_labels_may_be_given_by_key(validation, tmp_path):
    index = validation.index
    content = {index.key(2): [5, 6], index.key(4): [1], "other": [9999]}
    real = read_real_labels(index, write(tmp_path, content), 7)
    assert [row[row >= 0].tolist() for row in real] == [[5, 6] if n == 2 else [1] if n == 4 else [] for n in range(11)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1]", "is not JSON"),
        ("3", "must be a list or an object of lists of labels"),
        ([[1], [-2]], "the labels of 2 must be a list of integers from 0"),
        ({"other": [1]}, "has labels for none of the validation images, by key"),
        ({"5": [1]}, "has labels for none of the validation images, by key"),
        ([[], [1, 7]], "label 7 of 003_ILSVRC2012_val_00000002 is not in 0..6, the classes of the model"),
        ({"000_ILSVRC2012_val_00000004": [9999]}, "label 9999 of 000_ILSVRC2012_val_00000004 is not in 0..6"),
        (None, "cannot be read"),
    ],
    ids=[
        "no JSON",
        "a number",
        "negative",
        "other images",
        "a number of ImageNet",
        "too high",
        "too high by key",
        "missing",
    ],
)
def test_a_wrong_file_is_named(validation, tmp_path, content, message):
    path = tmp_path / "none.json" if content is None else write(tmp_path, content)
    with pytest.raises(SettingError, match=rf'^real_labels = ".*\.json": {message}'):
        read_real_labels(validation.index, path, 7)


def test_a_list_is_of_imagenets_numbers_and_not_of_keys_that_are_numbers(tmp_path):
    image = encode_png(np.zeros((8, 8), np.uint8))
    write_samples([(str(number), "png", image, 0) for number in range(1, 4)], tmp_path / "set", shard_size=4)
    with pytest.raises(SettingError, match="none of the validation images, by ImageNet's numbers"):
        read_real_labels(load_index(tmp_path / "set"), write(tmp_path, REAL), 7)
