import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_loader

from scalevit.data.transforms.base import TrainingAugmentation
from scalevit.data.transforms.device import DeviceTransform
from scalevit.data.transforms.timm_pipeline import TimmTraining, evaluation_transform
from scalevit.errors import SettingError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_training_shapes_and_randomness():
    transform = TimmTraining(TrainingAugmentation(image_size=32, mean=MEAN, auto_augment="rand-m9-mstd0.5-inc1"))
    first, second = transform(noise(50, 70)), transform(noise(50, 70))
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.uint8
    assert not torch.equal(first, second)


def test_plain_training_is_the_image():
    transform = TimmTraining(
        TrainingAugmentation(image_size=8, mean=MEAN, crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0, color_jitter=0)
    )
    image = noise(8, 8)
    assert torch.equal(transform(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_evaluation_is_timms():
    class One(torch.utils.data.Dataset):
        def __init__(self):
            self.transform = None

        def __len__(self):
            return 1

        def __getitem__(self, n):
            return self.transform(noise(50, 70)), 0

    ours = evaluation_transform(image_size=32, crop_pct=0.9)(noise(50, 70))
    loader = create_loader(
        One(), 32, 1, interpolation="bicubic", mean=MEAN, std=STD, crop_pct=0.9, num_workers=0,
        use_prefetcher=False, persistent_workers=False,
    )  # fmt: skip
    torch.testing.assert_close(DeviceTransform(mean=MEAN, std=STD)(ours[None]), next(iter(loader))[0])


@pytest.mark.parametrize("policy", ["rnd-m9", "rand-x9", "v9"])
def test_unknown_policy(policy):
    with pytest.raises(SettingError, match=f'^auto_augment = "{policy}": is not a timm auto-augment policy') as caught:
        TimmTraining(TrainingAugmentation(image_size=32, mean=MEAN, auto_augment=policy))
    assert "\n" not in str(caught.value)
