import random

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing

from scalevit.data.transforms.device import DeviceTransform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def test_normalisation():
    images = torch.randint(0, 256, (3, 3, 5, 5), dtype=torch.uint8).to(memory_format=torch.channels_last)
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    finished = DeviceTransform(mean=MEAN, std=STD)(images)
    torch.testing.assert_close(finished, (images / 255 - mean) / std)
    assert finished.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(DeviceTransform(mean=MEAN, std=STD)(images.contiguous()), finished)


def seed_all():
    np.random.seed(0), torch.manual_seed(0)


def test_erasing_is_distributed_as_timms():
    """How often, and how much of an image."""
    images = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    finish = DeviceTransform(mean=(0, 0, 0), std=(1, 1, 1), random_erasing=0.5)
    seed_all()
    ours = finish(images)
    seed_all()
    assert torch.equal(finish(images), ours)
    random.seed(0)
    theirs = RandomErasing(0.5, mode="pixel", device="cpu")(torch.zeros(400, 3, 32, 32))
    shares = [(batch != 0).all(1).float().mean((1, 2)) for batch in (ours, theirs)]
    often = [float((share > 0).float().mean()) for share in shares]
    assert often[0] == pytest.approx(0.5, abs=0.08)
    assert often[0] == pytest.approx(often[1], abs=0.1)
    areas = [float(share[share > 0].mean()) for share in shares]
    assert areas[0] == pytest.approx(areas[1], rel=0.15)
    noise = ours[ours != 0]
    assert abs(float(noise.std()) - 1) < 0.03
