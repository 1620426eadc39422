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


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_modes_fill_as_timms(mode):
    """Noise in each pixel, one colour, or zeros, which are the mean colour after normalisation."""
    images = torch.full((200, 3, 16, 16), 255, dtype=torch.uint8)
    ours = DeviceTransform(mean=(0, 0, 0), std=(1, 1, 1), random_erasing=1.0, mode=mode)(
        images, keys_of(np.arange(200))
    )
    random.seed(0), torch.manual_seed(0)
    theirs = RandomErasing(1.0, mode=mode, device="cpu")(torch.ones(200, 3, 16, 16))
    for batch in (ours, theirs):
        erased = batch != 1
        colours = [len(plane[where].unique()) for plane, where in zip(batch[:, 0], erased[:, 0], strict=True)]
        assert all(number > 1 for number in colours) if mode == "pixel" else max(colours) == 1
        values = batch[erased]
        assert (values == 0).all() if mode == "const" else abs(values.std() - 1) < 0.15
    shares = [float((batch != 1).float().mean()) for batch in (ours, theirs)]
    assert shares[0] == pytest.approx(shares[1], rel=0.2)  # four standard deviations of the mean of 200 areas


def test_several_rectangles_are_distributed_as_timms():
    """The erased area, and the number of rectangles as the number of colours, of one to four."""
    images = torch.zeros(ERASED, 3, 24, 24, dtype=torch.uint8)
    finish = DeviceTransform(mean=(0, 0, 0), std=(1, 1, 1), random_erasing=1.0, mode="rand", count=4)
    ours = finish(images, keys_of(np.arange(ERASED)))
    random.seed(0), torch.manual_seed(0)
    theirs = RandomErasing(1.0, mode="rand", max_count=4, device="cpu")(torch.zeros(ERASED, 3, 24, 24))
    areas, counts = zip(*((rectangle_area(batch), rectangle_count(batch)) for batch in (ours, theirs)), strict=True)
    assert ks_2samp(*areas).pvalue > 1e-3
    shares = [np.bincount(count, minlength=5) / ERASED for count in counts]
    assert (abs(shares[0] - shares[1]) < 5 * (2 * 0.25 / ERASED) ** 0.5).all()
    assert (shares[0][1:] > 0.15).all()


def rectangle_area(images):
    return (images[:, 0] != 0).flatten(1).sum(1).numpy()


def rectangle_count(images):
    return np.array([len(image.unique()) - 1 for image in images[:, 0]])


def test_the_clean_split_is_spared_as_in_timm():
    """With views the first ones, else the even rows: timm's first half of a batch, whose partners are in the second."""
    images = torch.zeros(12, 3, 16, 16, dtype=torch.uint8)
    settings = {"mean": (0, 0, 0), "std": (1, 1, 1), "random_erasing": 1.0, "clean_split": True}
    of_views = DeviceTransform(**settings, splits=3)(images, keys_of(np.arange(12)))
    assert (of_views != 0).flatten(1).any(1).tolist() == [False] * 4 + [True] * 8
    theirs = RandomErasing(1.0, mode="pixel", num_splits=3, device="cpu")(torch.zeros(12, 3, 16, 16))
    assert (theirs != 0).flatten(1).any(1).tolist() == [False] * 4 + [True] * 8
    of_rows = DeviceTransform(**settings)(images, keys_of(np.arange(12)))
    assert (of_rows != 0).flatten(1).any(1).tolist() == [False, True] * 6
