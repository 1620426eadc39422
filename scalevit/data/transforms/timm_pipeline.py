"""timm's own transforms for training and evaluation, from Pillow images to uint8.

As with timm's prefetcher, normalisation and random erasing are left to whole batches on their device
(`device.DeviceTransform`). Knows timm and tensors; must not know files, orders or configs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from timm.data import create_transform

from scalevit.data.transforms.base import TrainingAugmentation, Transform
from scalevit.errors import SettingError


def training_transform(augmentation: TrainingAugmentation) -> Transform:
    """timm's training transform: an RGB image to a (3, image_size, image_size) uint8 tensor.

    Raises:
        SettingError: `auto_augment` is not a timm policy.
    """
    with valid_policy(augmentation.auto_augment):
        return create_transform(
            augmentation.image_size,
            is_training=True,
            scale=augmentation.crop_scale,
            ratio=augmentation.crop_ratio,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.interpolation,
            mean=augmentation.mean,
            use_prefetcher=True,
        )


@contextmanager
def valid_policy(policy: str | None) -> Iterator[None]:
    """Reports a policy that timm refuses in the block as a setting; timm checks with asserts, look-ups and conversions.

    Raises:
        SettingError: `auto_augment` is not a timm policy.
    """
    try:
        yield
    except (AssertionError, KeyError, ValueError) as error:
        if policy is None:
            raise
        reason = " ".join(str(error).split())
        raise SettingError(
            "auto_augment", policy, f"is not a timm auto-augment policy ({reason}); example: rand-m9-mstd0.5-inc1"
        ) from None


def evaluation_transform(*, image_size: int, crop_pct: float, interpolation: str = "bicubic") -> Transform:
    """timm's evaluation transform: resize to image_size / crop_pct and central crop, as uint8.

    Args:
        image_size: side in pixels.
        crop_pct: central crop over resized side.
        interpolation: bilinear or bicubic.
    """
    return create_transform(image_size, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True)
