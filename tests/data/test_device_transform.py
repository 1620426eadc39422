import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from timm.data.random_erasing import RandomErasing

from scalevit.data.order.batching import PADDING
from scalevit.data.transforms.device import DeviceTransform
from scalevit.randomness import Purpose, row_keys

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
ERASED = 2000


def some_images(count, side=32):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def keys_of(rows, step=0, seed=0):
    return row_keys(seed, Purpose.ERASING, step, np.asarray(rows))


def test_normalisation():
    images = some_images(3, side=5).to(memory_format=torch.channels_last)
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    finished = DeviceTransform(mean=MEAN, std=STD)(images)
    torch.testing.assert_close(finished, (images / 255 - mean) / std)
    assert finished.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(DeviceTransform(mean=MEAN, std=STD)(images.contiguous()), finished)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_erasing_of_a_row_does_not_depend_on_those_it_is_computed_with(memory_format):
    """All rows at once against pieces of several sizes, with padding, and in another order."""
    images, rows = some_images(24).to(memory_format=memory_format), np.arange(24)
    finish = DeviceTransform(mean=MEAN, std=STD, random_erasing=0.5)
    plain = finish(images)
    for step in range(3):
        whole = finish(images, keys_of(rows, step))
        assert whole.is_contiguous(memory_format=memory_format)
        erased = (whole != plain).flatten(1).any(1)
        assert 0 < erased.sum() < 24
        for size in (1, 2, 5, 24):
            for start in range(0, 24, size):
                part = rows[start : start + size]
                padded = torch.cat([images[part], torch.zeros_like(images[:2])])
                finished = finish(padded, keys_of([*part, PADDING, PADDING], step))
                assert torch.equal(finished[:-2], whole[part])
        backwards = finish(images.flip(0), keys_of(rows[::-1], step))
        assert torch.equal(backwards.flip(0), whole)


def test_rows_steps_and_seeds_are_erased_differently():
    images, rows = torch.zeros(6, 3, 32, 32, dtype=torch.uint8), np.arange(6)
    finish = DeviceTransform(mean=MEAN, std=STD, random_erasing=1.0)
    batches = [finish(images, keys_of(rows, *place)) for place in ((0, 0), (1, 0), (0, 1))]
    finished = [image for batch in batches for image in batch]
    assert not any(torch.equal(one, other) for n, one in enumerate(finished) for other in finished[:n])


def test_neither_generators_nor_rows_without_keys_are_touched():
    images = some_images(8)
    finish = DeviceTransform(mean=MEAN, std=STD, random_erasing=1.0)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    erased = finish(images, keys_of(np.arange(8)))
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected
    plain = DeviceTransform(mean=MEAN, std=STD)
    assert not torch.equal(erased, finish(images))
    assert torch.equal(finish(images), plain(images))
    assert torch.equal(plain(images, keys_of(np.arange(8))), plain(images))


def rectangles(images):
    """(n, 4): top, left, height and width of what is erased in black images; only of those where something is."""
    found = []
    for noise in (images != 0).all(1):
        rows, columns = noise.any(1).nonzero().flatten().tolist(), noise.any(0).nonzero().flatten().tolist()
        if rows:
            top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
            assert noise[top:bottom, left:right].all()
            assert noise.sum() == (bottom - top) * (right - left), "one rectangle"
            found.append((top, left, bottom - top, right - left))
    return np.array(found)


@pytest.mark.parametrize("side", [32, 48])
def test_erasing_is_distributed_as_timms(side):
    """How often, and where, how high, how wide and how much; shares within five standard deviations, the rest by the
    two-sample test of Kolmogorov and Smirnov.
    """
    images = torch.zeros(ERASED, 3, side, side, dtype=torch.uint8)
    finish = DeviceTransform(mean=(0, 0, 0), std=(1, 1, 1), random_erasing=0.5)
    rows = np.arange(ERASED // 2)
    keys = np.concatenate([keys_of(rows, step) for step in (0, 1)])
    ours = finish(images, keys)
    assert torch.equal(finish(images, keys), ours)
    random.seed(0), torch.manual_seed(0)
    theirs = RandomErasing(0.5, mode="pixel", device="cpu")(torch.zeros(ERASED, 3, side, side))
    own, expected = rectangles(ours), rectangles(theirs)
    assert abs(len(own) - ERASED / 2) < 5 * (ERASED / 4) ** 0.5
    assert abs(len(own) - len(expected)) < 5 * (ERASED / 2) ** 0.5
    for boxes in (own, expected):  # from edge to edge
        assert (boxes[:, :2].min(0) == 0).all()
        assert ((boxes[:, :2] + boxes[:, 2:]).max(0) == side).all()
    for column in range(4):
        assert ks_2samp(own[:, column], expected[:, column]).pvalue > 1e-3
    for measure in (lambda box: box[:, 2] * box[:, 3], lambda box: box[:, 2] / box[:, 3]):
        assert ks_2samp(measure(own), measure(expected)).pvalue > 1e-3
        assert measure(own).mean() == pytest.approx(measure(expected).mean(), rel=0.1)
    noise, other = ours[ours != 0], theirs[theirs != 0]
    assert abs(float(noise.std()) - 1) < 0.01
    assert abs(float(noise.mean())) < 0.01
    assert ks_2samp(noise[:100_000].numpy(), other[:100_000].numpy()).pvalue > 1e-3
