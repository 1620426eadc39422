import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from scalevit.bench.loaders import photo
from scalevit.data.transforms.base import TrainingAugmentation
from scalevit.data.transforms.fast import FastEvaluation, FastTraining, resize
from scalevit.errors import SettingError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def picture(height, width, seed=0):
    """Smooth shapes and hard noise, so that every filter has something to ring at."""
    source = np.random.default_rng(seed)
    smooth = Image.fromarray(source.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8))
    pixels = np.array(smooth.resize((width, height), Image.Resampling.BICUBIC))
    pixels[: height // 3] = source.integers(0, 256, (height // 3, width, 3), np.uint8)
    return pixels


def seed(number):
    random.seed(number), np.random.seed(number), torch.manual_seed(number)


def timms(**settings):
    return create_transform(64, use_prefetcher=True, mean=MEAN, std=STD, **settings)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize("size", [(120, 160), (375, 500), (40, 30), (64, 64), (3, 500)])
def test_training_pixels_are_timms_within_two_levels(interpolation, size):
    ours = FastTraining(TrainingAugmentation(image_size=64, mean=MEAN, color_jitter=0, interpolation=interpolation))
    theirs = timms(is_training=True, color_jitter=0, auto_augment=None, interpolation=interpolation)
    for number in range(25):
        pixels = picture(*size, number)
        seed(number)
        shown = ours(pixels)
        seed(number)
        expected = np.asarray(theirs(Image.fromarray(pixels)))
        assert shown.dtype == torch.uint8
        assert_close(shown.numpy(), expected)


def assert_close(shown, expected):
    """Within one level, but for single values at hard edges, where torch's 16-bit weights are off by two."""
    difference = np.abs(shown.astype(int) - expected.astype(int))
    assert difference.max() <= 2
    assert (difference > 1).mean() < 0.0005


def test_resized_photos_are_pillows_within_two_levels():
    """As a training crop would: smaller and larger than what is wanted."""
    pixels = photo(0)
    for mode, theirs in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        for height, width in ((375, 500), (300, 200), (150, 400), (120, 130)):
            crop = pixels[:height, :width]
            shown, expected = resize(crop, (224, 224), mode), Image.fromarray(crop).resize((224, 224), theirs)
            difference = np.abs(shown.astype(int) - np.asarray(expected))
            assert difference.max() <= 2  # generated photos stay within one, real ones do not
            assert (difference > 1).mean() < 1e-5


@pytest.mark.parametrize("size", [(120, 160), (375, 500), (40, 31), (64, 64), (70, 70), (9, 500)])
@pytest.mark.parametrize("crop_pct", [0.9, 1.0, 0.875])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_pixels_are_timms_within_two_levels(size, crop_pct, interpolation):
    pixels = picture(*size)
    shown = FastEvaluation(image_size=64, crop_pct=crop_pct, interpolation=interpolation)(pixels).numpy()
    expected = np.asarray(timms(crop_pct=crop_pct, interpolation=interpolation)(Image.fromarray(pixels)))
    assert shown.shape == expected.shape == (3, 64, 64)
    assert_close(shown, expected)


def test_colour_jitter_is_torchvisions():
    ours = FastTraining(
        TrainingAugmentation(image_size=64, mean=MEAN, color_jitter=0.4, crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0)
    )
    theirs = timms(is_training=True, color_jitter=0.4, auto_augment=None, scale=(1, 1), ratio=(1, 1), hflip=0)
    pixels = picture(64, 64)
    for number in range(5):
        seed(number)
        shown = ours(pixels)
        seed(number)
        np.testing.assert_array_equal(shown.numpy(), theirs(Image.fromarray(pixels)))


def test_unknown_policy():
    with pytest.raises(SettingError, match=r'^auto_augment = "rand-x9": is not a timm auto-augment policy'):
        FastTraining(TrainingAugmentation(image_size=64, mean=MEAN, auto_augment="rand-x9"))
