import os
import pickle
import random

import numpy as np
import pytest
import torch

from scalevit.data.dataset import ShardDataset, _ShardFiles
from scalevit.data.images import encode_png
from scalevit.data.index import load_index
from scalevit.data.shards import write_samples
from scalevit.errors import UserError


def draws(image):
    """A transform that uses all three generators."""
    return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item(), *image.getpixel((0, 0))])


def test_copies_follow_from_seed_position_and_copy(index):
    dataset = ShardDataset(index, draws, seed=1)
    first = dataset.copies(4, position=100, copies=[0, 1, 2])
    assert torch.equal(dataset.copies(4, 100, [2])[0], first[2])
    others = [dataset.copies(4, 101, [0])[0], ShardDataset(index, draws, seed=2).copies(4, 100, [0])[0]]
    for a, b in ((first[0], first[1]), (first[0], first[2]), *((first[0], other) for other in others)):
        assert (a[:3] != b[:3]).all()
        assert torch.equal(a[3:], b[3:])


def test_generators_of_the_process_are_left_alone(index):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    ShardDataset(index, draws).copies(0, 0, [0, 1])
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


def test_items_and_pickling(index):
    dataset = ShardDataset(index, draws)
    assert len(dataset) == 23
    images = [dataset[n] for n in range(23)]
    assert [label for _, label in images] == index.label.tolist()
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(copy[n][0], image) for n, (image, _) in enumerate(images))
    with pytest.raises(IndexError):
        dataset[23]


def test_errors_in_transforms_are_bugs(index):
    def broken(image):
        raise ValueError("bits must be between 1 and 8")

    with pytest.raises(ValueError, match="bits"):
        ShardDataset(index, broken)[0]


def test_undecodable_image(tmp_path):
    samples = [("good", "png", encode_png(np.zeros((2, 2), np.uint8)), 0), ("bad", "jpg", b"no image", 0)]
    write_samples(samples, tmp_path / "set", total=2)
    dataset = ShardDataset(load_index(tmp_path / "set"), draws)
    dataset[0]
    message = r"shard .*shard-000000\.tar, key 'bad', offset \d+: the image cannot be decoded \(no known image format\)"
    with pytest.raises(UserError, match=message) as caught:
        dataset[1]
    assert "\n" not in str(caught.value)


def test_many_shards_keep_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(_ShardFiles, "_LIMIT", 3)
    samples = [(str(n), "png", encode_png(np.full((2, 2), n, np.uint8)), n) for n in range(12)]
    write_samples(samples, tmp_path / "set", total=12, shard_size=1)
    dataset = ShardDataset(load_index(tmp_path / "set"), draws)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [int(dataset[n][0][3]) for n in range(12)] == list(range(12))
    assert len(os.listdir("/proc/self/fd")) == before + 3


def test_changed_or_missing_shard(tmp_path):
    samples = [("a", "png", encode_png(np.zeros((2, 2), np.uint8)), 0)]
    write_samples(samples, tmp_path / "set", total=1)
    shard, index = tmp_path / "set" / "shard-000000.tar", load_index(tmp_path / "set")
    os.utime(shard, ns=(0, 0))
    for _ in range(2):
        with pytest.raises(UserError, match="changed since it was indexed"):
            ShardDataset(index, draws)[0]
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        ShardDataset(index, draws)[0]
