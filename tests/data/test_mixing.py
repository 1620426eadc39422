import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target

from scalevit.data.transforms.mixing import BatchMixing
from scalevit.errors import SettingError

CLASSES = 7


def targets(mixed, smoothing):
    """What a loss makes of mixed labels, with timm's smoothing."""
    own, partner = (mixup_target(labels, CLASSES, smoothing=smoothing) for labels in (mixed.labels, mixed.partners))
    return own * mixed.weight + partner * (1.0 - mixed.weight)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_images_and_targets_are_timms_bit_for_bit(mixup, cutmix, smoothing):
    """Also guards timm's private `Mixup._mix_batch`, which returns the weight."""
    ours = BatchMixing(mixup=mixup, cutmix=cutmix, probability=0.8)
    theirs = Mixup(mixup, cutmix, None, 0.8, 0.5, "batch", True, smoothing, CLASSES)
    weights = set()
    for number in range(40):
        images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        labels = torch.randint(CLASSES, (6,), generator=torch.Generator().manual_seed(number))
        np.random.seed(number)
        mixed_images, mixed = ours(images.clone(), labels)
        draw = np.random.rand()
        np.random.seed(number)
        expected_images, expected = theirs(images.clone(), labels)
        assert np.random.rand() == draw
        assert torch.equal(mixed_images, expected_images)
        assert torch.equal(targets(mixed, smoothing), expected)
        assert torch.equal(mixed.labels, labels)
        weights.add(mixed.weight)
    assert 1.0 in weights  # one in five is not mixed
    assert len(weights) > 10
    assert all(type(weight) is float for weight in weights)


def test_the_weight_has_double_precision():
    mix = BatchMixing(mixup=0.8, cutmix=0, probability=1)
    np.random.seed(0)
    _, mixed = mix(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))
    np.random.seed(0)
    np.random.rand()  # whether to mix
    assert mixed.weight == np.random.beta(0.8, 0.8)
    assert mixed.weight != float(np.float32(mixed.weight))


def test_rows_are_mixed_with_their_mirror():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2).clone()
    np.random.seed(0)
    mixed_images, mixed = BatchMixing(mixup=0.8, cutmix=0, probability=1)(images.clone(), torch.arange(4))
    assert 0 < mixed.weight < 1
    assert mixed.partners.tolist() == [3, 2, 1, 0]
    torch.testing.assert_close(mixed_images, mixed.weight * images + (1 - mixed.weight) * images.flip(0))


@pytest.mark.parametrize(
    "settings", [{"mixup": 0, "cutmix": 0, "probability": 1}, {"mixup": 1, "cutmix": 1, "probability": 0}]
)
def test_without_mixing_nothing_is_drawn_and_any_size_is_valid(settings):
    images, labels = torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 4])
    state = np.random.get_state()[1].tolist()
    same, mixed = BatchMixing(**settings)(images, labels)
    assert same is images
    assert mixed.weight == 1.0
    assert torch.equal(mixed.partners, labels)
    assert np.random.get_state()[1].tolist() == state
    expected = torch.full((3, CLASSES), 0.1 / CLASSES).scatter(1, labels[:, None], 0.9 + 0.1 / CLASSES)
    torch.testing.assert_close(targets(mixed, 0.1), expected)


def test_odd_micro_batch_cannot_be_mixed():
    mix = BatchMixing(mixup=0.8, cutmix=1.0, probability=1)
    with pytest.raises(SettingError, match=r"^micro_batch = 3: must be even for mixup and CutMix"):
        mix(torch.rand(3, 3, 2, 2), torch.zeros(3, dtype=torch.int64))
