import io
import os
import pickle
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

from scalevit.data.images import encode_png
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.readers import LocalReader
from scalevit.data.shards.index import load_index
from scalevit.data.writing.writer import write_samples
from scalevit.errors import UserError


def draws(image):
    """A transform that uses all three generators."""
    return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item(), *image.getpixel((0, 0))])


def test_copies_follow_from_seed_position_and_copy(index):
    dataset = ShardDataset(index, draws, seed=1)
    first = dataset.copies(4, position=100, copies=[0, 1, 2]).tensors
    assert torch.equal(dataset.copies(4, 100, [2]).tensors[0], first[2])
    others = [dataset.copies(4, 101, [0]), ShardDataset(index, draws, seed=2).copies(4, 100, [0])]
    others = [other.tensors[0] for other in others]
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


@pytest.fixture(scope="module")
def one_bad(tmp_path_factory):
    """Nine grey images of their own number and, as number 4, what is no image."""
    folder = tmp_path_factory.mktemp("one_bad") / "set"
    samples = [(f"n{n}", "png", encode_png(np.full((4, 4), n, np.uint8)), n) for n in range(10)]
    samples[4] = ("bad", "jpg", b"no image", 4)
    write_samples(samples, folder, shard_size=6)
    return load_index(folder)


def grey(image):
    return torch.tensor(image.getpixel((0, 0))[0])


REASON = r"shard .*shard-000000\.tar, key 'bad', offset \d+: the image cannot be decoded \(unknown image format\)"


def test_a_bad_sample_is_replaced_by_another_that_position_and_seed_decide(one_bad):
    dataset = ShardDataset(one_bad, grey, seed=1)
    shown = [dataset.copies(4, position, [0, 1]) for position in range(100)]
    for one in shown:
        assert one.sample != 4
        assert [int(tensor) for tensor in one.tensors] == [one.sample] * 2
        assert {str(fault) for fault in one.faults} == {str(shown[0].faults[0])}
        assert re.fullmatch(REASON, str(one.faults[0]))
    # Which one stands in changes with the position: else one image would be seen twice as often as all others.
    assert len({one.sample for one in shown}) == 9
    again = ShardDataset(one_bad, grey, seed=1).copies(4, 7, [0])
    assert again.sample == shown[7].sample
    assert any(ShardDataset(one_bad, grey, seed=2).copies(4, n, [0]).sample != shown[n].sample for n in range(9))


def test_an_undecodable_image_by_itself(one_bad):
    dataset = ShardDataset(one_bad, grey)
    assert re.fullmatch(REASON, str(dataset.image(4)))
    assert int(dataset.image(5)) == 5
    with pytest.raises(UserError, match=REASON) as caught:
        dataset[4]
    assert "\n" not in str(caught.value)


def test_a_set_of_nothing_but_bad_images_ends(tmp_path):
    write_samples([("bad", "jpg", b"no image", 0)], tmp_path / "set")
    with pytest.raises(UserError, match="15 replacements are bad too"):
        ShardDataset(load_index(tmp_path / "set"), grey).copies(0, 0, [0])


def test_flipped_bytes_are_found_by_the_checksum(tmp_path):
    """A PNG's reserved bytes and the pixels of a BMP-like payload: nothing that a decoder would notice."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG", comment=b"a comment that no decoder looks at")
    payload = file.getvalue()
    write_samples([(f"n{n}", "jpg", payload, n) for n in range(3)], tmp_path / "set")
    shard = tmp_path / "set" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    second = content.index(b"a comment", content.index(b"a comment") + 1)
    content[second] ^= 1
    shard.write_bytes(content)
    dataset = ShardDataset(load_index(tmp_path / "set"), grey)
    assert isinstance(dataset.image(0), torch.Tensor)
    assert "key 'n1'" in str(dataset.image(1))
    assert "checksum" in str(dataset.image(1))
    assert dataset.copies(1, 0, [0]).sample != 1


def test_many_shards_keep_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalReader, "_LIMIT", 3)
    samples = [(str(n), "png", encode_png(np.full((2, 2), n, np.uint8)), n) for n in range(12)]
    write_samples(samples, tmp_path / "set", shard_size=1)
    dataset = ShardDataset(load_index(tmp_path / "set"), draws)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [int(dataset[n][0][3]) for n in range(12)] == list(range(12))
    assert len(os.listdir("/proc/self/fd")) == before + 3


def test_changed_or_missing_shard(tmp_path):
    samples = [("a", "png", encode_png(np.zeros((2, 2), np.uint8)), 0)]
    write_samples(samples, tmp_path / "set")
    shard, index = tmp_path / "set" / "shard-000000.tar", load_index(tmp_path / "set")
    os.utime(shard, ns=(0, 0))
    for _ in range(2):
        with pytest.raises(UserError, match="changed since it was indexed"):
            ShardDataset(index, draws)[0]
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        ShardDataset(index, draws)[0]
