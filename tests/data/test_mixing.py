"""Mixup and CutMix: the pairs, the arithmetic, and timm's distributions."""

import itertools

import numpy as np
import pytest
import timm.data.mixup
import torch
from scipy.stats import ks_2samp
from timm.data import FastCollateMixup, Mixup
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.mixup import cutmix_bbox_and_lam

from scalevit.data.order.batching import PADDING, BatchLayout
from scalevit.data.order.shuffle import Order
from scalevit.data.transforms.mixing import BatchMixing
from scalevit.errors import SettingError
from scalevit.training.losses.base import soft_targets

DRAWS = 100_000


def mix(mixing, images, rows, step=0):
    return mixing(images.clone(), torch.arange(len(images)), step=step, rows=np.asarray(rows))


def images(count, side=8):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def test_mixup_is_a_weighted_mean_of_partners():
    before = images(6)
    after, mixed = mix(BatchMixing(mixup=0.8, cutmix=0, probability=1), before, range(6))
    assert mixed.partners.tolist() == [1, 0, 3, 2, 5, 4]
    assert mixed.weight.dtype == torch.float64
    assert len(set(mixed.weight.tolist())) == 1
    weight = mixed.weight[0].item()
    assert 0 < weight < 1
    torch.testing.assert_close(after, weight * before + (1 - weight) * before[mixed.partners])


def test_cutmix_takes_one_rectangle_from_partners():
    before = images(4, side=16)
    for step in range(20):
        after, mixed = mix(BatchMixing(mixup=0, cutmix=1.0, probability=1), before, range(4), step)
        foreign = (after != before).any(dim=1)
        rows, columns = foreign[0].any(1).nonzero(), foreign[0].any(0).nonzero()
        box = torch.zeros(16, 16, dtype=torch.bool)
        if len(rows):
            box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        assert torch.equal(foreign, box.expand_as(foreign))
        assert torch.equal(after, torch.where(box, before[mixed.partners], before))
        assert mixed.weight.tolist() == [1 - box.sum().item() / 256] * 4


@pytest.mark.parametrize(
    "settings",
    [
        {"mixup": 0.8, "cutmix": 0},
        {"mixup": 0, "cutmix": 1.0},
        {"mixup": 0.8, "cutmix": 1.0},
        {"mixup": 0.8, "cutmix": 1.0, "mode": "pair"},
        {"mixup": 0.8, "cutmix": 1.0, "mode": "elem", "cutmix_minmax": (0.2, 0.8)},
    ],
)
def test_a_row_does_not_depend_on_those_it_is_computed_with(settings):
    """All rows at once against pieces of several sizes, with and without padding, over borders of groups."""
    mixing = BatchMixing(**settings, probability=0.8, group=6, seed=3)
    before = images(30)
    for step in range(5):
        whole, expected = mix(mixing, before, range(30), step)
        assert len(set(expected.weight.tolist())) > 1
        for size in (2, 4, 10):
            for start in range(0, 30, size):
                rows = list(range(start, min(start + size, 30)))
                padded = [*rows, PADDING, PADDING]
                part, mixed = mixing(
                    torch.cat([before[rows], torch.zeros(2, 3, 8, 8)]),
                    torch.tensor([*rows, 0, 0]),
                    step=step,
                    rows=np.array(padded),
                )
                assert torch.equal(part[:-2], whole[rows])
                assert torch.equal(mixed.weight[:-2], expected.weight[rows])
                assert torch.equal(mixed.partners[:-2], expected.partners[rows])
                assert mixed.weight[-2:].tolist() == [1, 1], "padding is not mixed"
                assert not part[-2:].any()


def test_channels_last_is_the_same():
    mixing = BatchMixing(mixup=0.8, cutmix=1.0, probability=1, group=2)
    before = images(12)
    expected, _ = mix(mixing, before, range(12))
    last = before.contiguous(memory_format=torch.channels_last)
    after, _ = mixing(last, torch.arange(12), step=0, rows=np.arange(12))
    assert torch.equal(after, expected)
    assert after.is_contiguous(memory_format=torch.channels_last)


def test_the_last_row_of_an_odd_global_batch_is_not_mixed():
    before = images(4)
    after, mixed = mix(BatchMixing(mixup=0.8, cutmix=0, probability=1), before, [0, 1, 2, PADDING])
    assert torch.equal(after[2:], before[2:])
    assert mixed.weight[2:].tolist() == [1, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"mixup": 0, "cutmix": 0, "probability": 1},
        {"mixup": 1, "cutmix": 1, "probability": 0},
        {"mixup": 1, "cutmix": 1, "until_step": 0},
    ],
)
def test_without_mixing_images_stay(settings):
    before, labels = images(3), torch.tensor([0, 1, 4])
    same, mixed = BatchMixing(**settings)(before, labels, step=0, rows=np.arange(3))
    assert same is before
    assert mixed.weight.tolist() == [1, 1, 1]
    assert torch.equal(mixed.partners, labels)


def test_an_odd_group_is_refused():
    with pytest.raises(SettingError, match="mixing_group = 3: must be even"):
        BatchMixing(mixup=1, cutmix=0, probability=1, group=3)


def in_timms_rows(count):
    """Places of our rows in a batch of timm's, whose image j is mixed with the j-th from the end."""
    return [place for pair in range(count // 2) for place in (pair, count - 1 - pair)]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("minmax", [None, (0.2, 0.8)], ids=["alpha", "minmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["float", "8 bits"])
def test_images_and_targets_are_timms_for_the_same_draws(monkeypatch, mode, minmax, dtype):
    """`Mixup` for normalised images, and `FastCollateMixup`, its prefetcher's, for 8-bit values."""
    count, side, step = 12, 10, 3
    mixing = BatchMixing(mixup=0.8, cutmix=1.0, cutmix_minmax=minmax, probability=0.8, mode=mode, group=count)
    units = {"batch": 1, "pair": count // 2, "elem": count}[mode]
    draws = [mixing.draw(step, unit, side, side) for unit in range(units)]
    kinds = {None if drawn is None else drawn.box is None for drawn in draws}
    assert mode == "batch" or kinds == {None, True, False}, "some are not mixed, some by each way"
    if mode == "elem":  # in timm's order of rows
        draws = [draws[in_timms_rows(count).index(place)] for place in range(count)]
    boxes = iter([(drawn.box, drawn.weight) for drawn in draws if drawn is not None and drawn.box is not None])
    weights = [1.0 if drawn is None else drawn.weight for drawn in draws]
    cuts = [drawn is not None and drawn.box is not None for drawn in draws]
    arguments = {"mode": mode, "num_classes": 5, "label_smoothing": 0.1, "cutmix_minmax": minmax}
    theirs = (Mixup if dtype == torch.float32 else FastCollateMixup)(0.8, 1.0, prob=0.8, **arguments)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (weights[0], cuts[0]))
    monkeypatch.setattr(theirs, "_params_per_elem", lambda n: (np.array(weights, np.float32), np.array(cuts)))
    monkeypatch.setattr(timm.data.mixup, "cutmix_bbox_and_lam", lambda *_, **__: next(boxes))
    before, labels = (images(count, side) * 255).to(dtype), torch.arange(count) % 5
    places = torch.tensor(in_timms_rows(count)).argsort()  # of timm's rows among ours
    if dtype == torch.float32:
        expected, targets = theirs(before[places].clone(), labels[places])
    else:
        expected, targets = theirs([(before[n].clone(), int(labels[n])) for n in places])
    after, mixed = mixing(before.clone(), labels, step=step, rows=np.arange(count))
    assert after.dtype == dtype
    torch.testing.assert_close(after[places], expected, rtol=1e-6, atol=1e-4)  # of 255
    torch.testing.assert_close(soft_targets(mixed, 5, 0.1)[places], targets, rtol=0, atol=1e-6)


def test_images_are_mixed_until_an_epoch_ends():
    """timm: not in epochs from `mixup_off_epoch` on."""
    mixing = BatchMixing(mixup=0.8, cutmix=0, until_step=3)
    mixed = [mix(mixing, images(4), range(4), step)[1].weight[0].item() for step in range(6)]
    assert [weight < 1 for weight in mixed] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("settings", "draws"),
    [
        ({"mixup": 0.8, "cutmix": 0}, 10_000),
        ({"mixup": 0, "cutmix": 1.0}, 10_000),
        ({"mixup": 0.8, "cutmix": 1.0}, DRAWS),
        ({"mixup": 0.3, "cutmix": 0, "cutmix_minmax": (0.2, 0.8), "switch": 0.7}, 10_000),
    ],
    ids=["mixup", "cutmix", "both", "minmax"],
)
def test_draws_are_distributed_as_timms(settings, draws):
    """Weights by the two-sample test of Kolmogorov and Smirnov; shares within five standard deviations."""
    mixing = BatchMixing(**settings, probability=0.7, seed=1)
    ours = [mixing.draw(step, 0, 224, 224) for step in range(draws)]
    minmax, switch = mixing.cutmix_minmax, mixing.switch
    theirs = Mixup(mixing.mixup, mixing.cutmix, minmax, prob=0.7, switch_prob=switch, mode="batch", correct_lam=True)
    np.random.seed(0)
    mixup, cutmix, sides, mixed = [], [], [], 0
    for _ in range(draws):
        weight, cuts = theirs._params_per_batch()
        if cuts:
            box, weight = cutmix_bbox_and_lam((1, 3, 224, 224), weight, ratio_minmax=minmax, correct_lam=True)
            sides.append(box[1] - box[0])
        mixed += cuts or weight != 1.0
        if cuts or weight != 1.0:
            (cutmix if cuts else mixup).append(weight)
    drawn = [one for one in ours if one is not None]
    deviation = (2 * 0.7 * 0.3 / draws) ** 0.5  # of the difference of two shares
    assert abs(len(drawn) - mixed) / draws < 5 * deviation
    by_kind = [one.weight for one in drawn if one.box is None], [one.weight for one in drawn if one.box is not None]
    for own, expected in zip(by_kind, (mixup, cutmix), strict=True):
        assert abs(len(own) - len(expected)) / draws < 5 * (2 * 0.25 / draws) ** 0.5
        if expected:
            assert ks_2samp(own, expected).pvalue > 1e-3
    if sides:
        assert ks_2samp([one.box[1] - one.box[0] for one in drawn if one.box is not None], sides).pvalue > 1e-3


def epochs_of(sampler):
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from sampler


@pytest.mark.parametrize("samples", [20_000, 1_281_167], ids=["small set", "ImageNet"])
def test_pairs_are_as_far_apart_as_in_timms_loader(samples):
    """timm's RepeatAugSampler, and row j of a batch mixed with the j-th from the end, as `Mixup` does."""
    steps = -(-DRAWS // 512)
    rows = [BatchLayout(1024, 3).rows(step, np.arange(1024))[0] for step in range(steps)]
    ids = Order(samples, seed=3).ids(np.concatenate(rows))
    ours = abs(ids[0::2] - ids[1::2])
    sampler = RepeatAugSampler(range(samples), num_replicas=1, rank=0, num_repeats=3, selected_round=0)
    batches = np.fromiter(itertools.islice(epochs_of(sampler), steps * 1024), np.int64).reshape(-1, 256)
    theirs = abs(batches - batches[:, ::-1])[:, :128].ravel()
    assert (theirs == 0).mean() > 0.001
    assert not (ours == 0).any(), "copies of one image are never mixed"
    # The same two images meet in up to three copies, so a third of the pairs are independent; 1 % are this far apart.
    assert ks_2samp(ours, theirs[theirs > 0]).statistic < 1.63 * (2 / (len(ours) / 3)) ** 0.5
