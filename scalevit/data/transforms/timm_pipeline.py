"""timm's own transforms for training and evaluation, from Pillow images to uint8.

As with timm's prefetcher, normalisation and random erasing are left to whole batches on their device
(`device.DeviceTransform`). Knows timm and tensors; must not know files, orders or configs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, create_transform
from torch import Tensor
from torchvision.transforms import Compose

from scalevit.data.transforms.base import Colour, TrainingAugmentation, Transform
from scalevit.errors import SettingError

# Of torchvision's blur in timm's pipeline, which reflects the image at its border.
_BLUR_KERNEL = 23


class TimmTraining:
    """timm's training transform: an RGB image to uint8, (3, S, S) or, with splits, (splits, 3, S, S).

    Raises:
        SettingError: `auto_augment` is not a timm policy, or the image is too small for `gaussian_blur_prob`.
    """

    def __init__(self, augmentation: TrainingAugmentation) -> None:
        self.splits = augmentation.splits
        self._base, self._augment, self._finish = stages(augmentation)

    def __call__(self, image: Image.Image) -> Tensor:
        """image: RGB."""
        base = self._base(image)
        if not self.splits:
            return self._finish(self._augment(base))
        others = [self._augment(base) for _ in range(self.splits - 1)]
        return torch.stack([self._finish(view) for view in (base, *others)])


def stages(augmentation: TrainingAugmentation) -> tuple[Compose, Compose, Compose]:
    """timm's pipeline in its three parts: crop and flips, what changes colours and shapes, to a tensor.

    Raises:
        SettingError: as `TimmTraining`.
    """
    blur, size = augmentation.gaussian_blur_prob, augmentation.image_size
    if blur and size <= _BLUR_KERNEL // 2:
        raise SettingError("gaussian_blur_prob", blur, f"needs images of over {_BLUR_KERNEL // 2} pixels, not {size}")
    with valid_policy(augmentation.auto_augment):
        return create_transform(
            size,
            is_training=True,
            train_crop_mode=augmentation.crop_mode,
            scale=augmentation.crop_scale,
            ratio=augmentation.crop_ratio,
            hflip=augmentation.hflip,
            vflip=augmentation.vflip,
            color_jitter=augmentation.color_jitter,
            color_jitter_prob=augmentation.color_jitter_prob,
            grayscale_prob=augmentation.grayscale_prob,
            gaussian_blur_prob=blur,
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.interpolation,
            mean=augmentation.mean,
            use_prefetcher=True,
            separate=True,
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


def evaluation_transform(
    *,
    image_size: int,
    crop_pct: float,
    interpolation: str = "bicubic",
    crop_mode: str = "center",
    mean: Colour = IMAGENET_DEFAULT_MEAN,
) -> Transform:
    """timm's evaluation transform: resize to image_size / crop_pct and central crop, as uint8.

    Args:
        image_size: side in pixels.
        crop_pct: central crop over resized side.
        interpolation: a filter of Pillow: bilinear, bicubic, lanczos, nearest, box or hamming.
        crop_mode: the shortest side (center), both sides (squash) or the longest one (border) are resized.
        mean: colour of the border.
    """
    return create_transform(
        image_size,
        crop_pct=crop_pct,
        interpolation=interpolation,
        crop_mode=crop_mode,
        mean=mean,
        use_prefetcher=True,
    )
