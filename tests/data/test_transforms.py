import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_loader

from scalevit.data.transforms.fast import Finish
from scalevit.data.transforms.timm_pipeline import Mix, evaluation_transform, training_transform
from scalevit.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_training_shapes_and_randomness():
    transform = training_transform(image_size=32, mean=MEAN, auto_augment="rand-m9-mstd0.5-inc1")
    first, second = transform(noise(50, 70)), transform(noise(50, 70))
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.uint8
    assert not torch.equal(first, second)


def test_plain_training_is_the_image():
    transform = training_transform(
        image_size=8, mean=MEAN, crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0, color_jitter=0
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
    torch.testing.assert_close(Finish(mean=MEAN, std=STD)(ours[None]), next(iter(loader))[0])


@pytest.mark.parametrize("policy", ["rnd-m9", "rand-x9", "v9"])
def test_unknown_policy(policy):
    with pytest.raises(UserError, match=f"data.augmentation.auto_augment = '{policy}' is no policy of timm") as caught:
        training_transform(image_size=32, mean=MEAN, auto_augment=policy)
    assert "\n" not in str(caught.value)


def test_smoothing_alone():
    images, labels = torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 4])
    mixed, targets = Mix(mixup=0, cutmix=0, probability=1, label_smoothing=0.1, num_classes=5)(images, labels)
    assert torch.equal(mixed, images)
    expected = torch.full((3, 5), 0.02).scatter(1, labels[:, None], 0.92)
    torch.testing.assert_close(targets, expected)


def test_mixup_mixes_mirrored_rows():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2).clone()
    mix = Mix(mixup=0.8, cutmix=0, probability=1, label_smoothing=0, num_classes=4)
    np.random.seed(0)
    mixed, targets = mix(images.clone(), torch.arange(4))
    share = targets[0, 0].item()
    assert 0 < share < 1
    torch.testing.assert_close(targets, share * torch.eye(4) + (1 - share) * torch.eye(4).flip(0))
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    np.random.seed(0)
    assert torch.equal(mix(images.clone(), torch.arange(4))[1], targets)


def test_odd_micro_batch_cannot_be_mixed():
    mix = Mix(mixup=0.8, cutmix=1.0, probability=1, label_smoothing=0.1, num_classes=4)
    with pytest.raises(UserError, match=r"train\.micro_batch = 3 must be even"):
        mix(torch.rand(3, 3, 2, 2), torch.zeros(3, dtype=torch.int64))
