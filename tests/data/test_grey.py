"""Grey images, for models with one input channel, against timm's on images of Pillow's mode "L"."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_fast import picture, seed, timms

from scalevit.data.transforms.base import TrainingAugmentation
from scalevit.data.transforms.fast import FastEvaluation, FastTraining
from scalevit.data.transforms.grey import for_channels, in_grey
from scalevit.data.transforms.timm_pipeline import TimmTraining, evaluation_transform

MEAN = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("build", "levels"), [(TimmTraining, 0), (FastTraining, 2)])
def test_training_pixels_are_timms(build, levels) -> None:
    """Equal, or within the two levels of the fast resize."""
    ours = in_grey(build(TrainingAugmentation(image_size=64, mean=MEAN, color_jitter=0, vflip=0.5)))
    theirs = timms(is_training=True, color_jitter=0, auto_augment=None, vflip=0.5, interpolation="random")
    pixels = picture(120, 160)
    for number in range(10):
        seed(number)
        shown = ours(pixels if build is FastTraining else Image.fromarray(pixels))
        seed(number)
        expected = theirs(Image.fromarray(pixels).convert("L"))
        assert shown.shape == expected.shape == (1, 64, 64)
        assert np.abs(shown.numpy().astype(int) - np.asarray(expected)).max() <= levels


@pytest.mark.parametrize("build", [TimmTraining, FastTraining])
def test_policies_and_views_stay_grey(build) -> None:
    settings = TrainingAugmentation(image_size=64, mean=MEAN, auto_augment="rand-m9-mstd0.5-inc1", splits=3)
    seed(0)
    pixels = picture(80, 80)
    views = in_grey(build(settings))(pixels if build is FastTraining else Image.fromarray(pixels))
    assert views.shape == (3, 1, 64, 64)
    assert len(torch.unique(views, dim=0)) == 3


@pytest.mark.parametrize("build", [evaluation_transform, FastEvaluation])
def test_evaluation_pixels_are_timms(build) -> None:
    pixels = picture(120, 160)
    shown = in_grey(build(image_size=64, crop_pct=0.9))(pixels if build is FastEvaluation else Image.fromarray(pixels))
    expected = timms(crop_pct=0.9, interpolation="bicubic")(Image.fromarray(pixels).convert("L"))
    assert shown.shape == (1, 64, 64)
    assert np.abs(shown.numpy().astype(int) - np.asarray(expected)).max() <= (2 if build is FastEvaluation else 0)


def test_the_normalisation_is_the_average() -> None:
    assert for_channels((0.4, 0.5, 0.6), 3) == (0.4, 0.5, 0.6)
    assert for_channels((0.4, 0.5, 0.6), 1) == pytest.approx((0.5,))
