import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import AugMixDataset, create_transform

from scalevit.bench.loaders import photo
from scalevit.data.transforms.base import TrainingAugmentation
from scalevit.data.transforms.fast import FastEvaluation, FastTraining, resize
from scalevit.data.transforms.timm_pipeline import TimmTraining, evaluation_transform
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


RECIPES = {
    "vertical flip": {"hflip": 0, "vflip": 0.5},
    "jitter by chance": {"color_jitter": 0.4, "color_jitter_prob": 0.5},
    "no jitter, grey": {"color_jitter": 0, "grayscale_prob": 0.5},
    "blur": {"color_jitter": 0.3, "color_jitter_prob": 0.8, "grayscale_prob": 0.2, "gaussian_blur_prob": 0.5},
    "three-augment with jitter": {"auto_augment": "3a", "color_jitter": 0.3},
    "three-augment, everything": {"auto_augment": "3a-j", "grayscale_prob": 0.3, "vflip": 0.3},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_are_timms_draw_by_draw(recipe):
    """Images of the wanted size, so that nothing is resized and pixels are equal; after a blur of equal ones too."""
    plain = {"crop_scale": (1, 1), "crop_ratio": (1, 1)}
    ours = FastTraining(TrainingAugmentation(image_size=64, mean=MEAN, **plain, **recipe))
    same = TimmTraining(TrainingAugmentation(image_size=64, mean=MEAN, **plain, **recipe))
    theirs = timms(is_training=True, interpolation="random", scale=(1, 1), ratio=(1, 1), **recipe)
    pixels, results = picture(64, 64), set()
    for number in range(12):
        seed(number)
        expected = np.asarray(theirs(Image.fromarray(pixels)))
        seed(number)
        np.testing.assert_array_equal(same(Image.fromarray(pixels)).numpy(), expected)
        seed(number)
        np.testing.assert_array_equal(ours(pixels).numpy(), expected)
        results.add(expected.tobytes())
    assert len(results) > 1


@pytest.mark.parametrize("mode", ["rkrc", "rkrr"])
@pytest.mark.parametrize("size", [(120, 160), (90, 40), (64, 64)])
def test_crop_modes_are_timms_within_two_levels(mode, size):
    settings = {"crop_scale": (0.6, 1.2), "crop_ratio": (0.8, 1.25)}
    ours = FastTraining(TrainingAugmentation(image_size=64, mean=MEAN, color_jitter=0, crop_mode=mode, **settings))
    sizes = dict(zip(("scale", "ratio"), settings.values(), strict=True))
    theirs = timms(is_training=True, train_crop_mode=mode, color_jitter=0, interpolation="random", **sizes)
    for number in range(12):
        pixels = picture(*size, number)
        seed(number)
        shown = ours(pixels)
        seed(number)
        assert_close(shown.numpy(), np.asarray(theirs(Image.fromarray(pixels))))


@pytest.mark.parametrize("crop_mode", ["squash", "border"])
@pytest.mark.parametrize("size", [(120, 160), (40, 31), (64, 64), (9, 100)])
@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
def test_evaluation_crop_modes_are_timms(crop_mode, size, crop_pct):
    pixels = picture(*size)
    settings = {"crop_pct": crop_pct, "interpolation": "bicubic", "crop_mode": crop_mode}
    expected = np.asarray(timms(**settings)(Image.fromarray(pixels)))
    assert_close(FastEvaluation(image_size=64, mean=MEAN, **settings)(pixels).numpy(), expected)
    same = evaluation_transform(image_size=64, mean=MEAN, **settings)(Image.fromarray(pixels))
    np.testing.assert_array_equal(same.numpy(), expected)


def test_other_filters_are_timms_only():
    with pytest.raises(SettingError, match=r'^interpolation = "lanczos": fast transforms resize by'):
        FastEvaluation(image_size=64, crop_pct=1.0, interpolation="lanczos")
    settings = {"crop_pct": 0.9, "interpolation": "lanczos"}
    expected = np.asarray(timms(**settings)(Image.fromarray(picture(80, 100))))
    same = evaluation_transform(image_size=64, **settings)(Image.fromarray(picture(80, 100)))
    np.testing.assert_array_equal(same.numpy(), expected)


@pytest.mark.parametrize("build", [FastTraining, TimmTraining])
def test_views_are_those_of_timms_augmix_data_set(build):
    """A clean view, and others with the same crop and flips, each augmented for itself."""

    class One(torch.utils.data.Dataset):
        transform = None

        def __getitem__(self, number):
            return self.transform(Image.fromarray(picture(64, 64))), 0

    settings = {"auto_augment": "rand-m9-mstd0.5-inc1", "hflip": 0.5, "interpolation": "bicubic"}
    theirs = AugMixDataset(One(), num_splits=3)
    theirs.transform = timms(is_training=True, scale=(1, 1), ratio=(1, 1), separate=True, **settings)
    ours = build(
        TrainingAugmentation(image_size=64, mean=MEAN, crop_scale=(1, 1), crop_ratio=(1, 1), splits=3, **settings)
    )
    for number in range(4):
        image = picture(64, 64)
        seed(number)
        shown = ours(image if build is FastTraining else Image.fromarray(image))
        seed(number)
        expected, _ = theirs[0]
        assert shown.shape == (3, 3, 64, 64)
        np.testing.assert_array_equal(shown[0].numpy(), expected[0])
        assert not torch.equal(shown[1], shown[2])
        if build is TimmTraining:  # the fast path rotates and moves in another way
            np.testing.assert_array_equal(shown.numpy(), np.stack(expected))


@pytest.mark.parametrize("build", [FastTraining, TimmTraining])
def test_a_blur_needs_its_kernel(build):
    with pytest.raises(SettingError, match=r"^gaussian_blur_prob = 0\.1: needs images of over 11 pixels, not 8"):
        build(TrainingAugmentation(image_size=8, mean=MEAN, gaussian_blur_prob=0.1))
    build(TrainingAugmentation(image_size=12, mean=MEAN, gaussian_blur_prob=1))


def test_unknown_policy():
    with pytest.raises(SettingError, match=r'^auto_augment = "rand-x9": is not a timm auto-augment policy'):
        FastTraining(TrainingAugmentation(image_size=64, mean=MEAN, auto_augment="rand-x9"))
