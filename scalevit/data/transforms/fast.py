"""Fast transforms: timm's recipe with the resize in torch on uint8 and the augmentation in numpy.

The random draws are timm's, in timm's order, so the same seed gives the same crops and flips. Resized pixels are within
two levels of timm's on photos, nearly all within one; `fast_ops` says what differs in the augmentation. Pixels stay
(H, W, 3) in memory: tensors that seem transposed below are views. Knows torch, timm and arrays; must not know files,
orders or configs.
"""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import ColorJitter

from scalevit.data.transforms.base import ArrayTransform, TrainingAugmentation
from scalevit.data.transforms.fast_ops import Augmentation, augmentation, through_pillow

_MODES = {"bilinear": ("bilinear",), "bicubic": ("bicubic",), "random": ("bilinear", "bicubic")}


def resize(pixels: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Pillow's resampling within two levels, in a fifth of the time.

    Args:
        pixels: (H, W, 3) uint8, possibly a view.
        size: (height, width) of the result.
        mode: bilinear or bicubic.

    Returns:
        (height, width, 3) uint8.
    """
    if pixels.shape[:2] == size:
        return np.ascontiguousarray(pixels)
    # For views, and without channels-last strides in all four dimensions, torch uses its much slower planar code.
    image = torch.from_numpy(pixels).contiguous()[None].permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=size, mode=mode, antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()


class FastTraining(ArrayTransform):
    """timm's training transform up to the augmentation: (H, W, 3) uint8 to (3, image_size, image_size) uint8.

    Raises:
        SettingError: `auto_augment` is not a timm policy.
    """

    def __init__(self, settings: TrainingAugmentation) -> None:
        self.image_size, self.hflip = settings.image_size, settings.hflip
        self.crop_scale, self.crop_ratio = settings.crop_scale, settings.crop_ratio
        self.modes = _MODES[settings.interpolation]
        self.augment: Augmentation | None = None
        if settings.auto_augment is not None:
            self.augment = augmentation(settings.auto_augment, settings.image_size, settings.mean)
        elif settings.color_jitter:
            self.augment = through_pillow(ColorJitter(*[settings.color_jitter] * 3))

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """pixels: (H, W, 3) uint8; returns (3, S, S) uint8."""
        view = torch.from_numpy(pixels).permute(2, 0, 1)
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(view, self.crop_scale, self.crop_ratio)
        mode = random.choice(self.modes) if len(self.modes) > 1 else self.modes[0]
        side = self.image_size
        augmented = resize(pixels[top : top + height, left : left + width], (side, side), mode)
        # timm draws nothing if the probability is 0.
        if self.hflip > 0 and torch.rand(1) < self.hflip:
            augmented = torch.from_numpy(augmented).flip(1).numpy()
        if self.augment is not None:
            augmented = self.augment(augmented)
        return torch.from_numpy(augmented).permute(2, 0, 1)


class FastEvaluation(ArrayTransform):
    """timm's evaluation transform up to the normalisation, as uint8: resize to image_size / crop_pct, central crop.

    Args:
        image_size: side in pixels.
        crop_pct: central crop over resized side.
        interpolation: bilinear or bicubic.
    """

    def __init__(self, *, image_size: int, crop_pct: float, interpolation: str = "bicubic") -> None:
        self.image_size, self.interpolation = image_size, interpolation
        self.resized_side = math.floor(image_size / crop_pct)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """pixels: (H, W, 3) uint8; returns (3, S, S) uint8."""
        height, width, _ = pixels.shape
        side, shortest = self.resized_side, min(height, width)
        # As torchvision rounds, for the resize and for the central crop.
        size = int(side * height / shortest), int(side * width / shortest)
        resized = resize(pixels, size, self.interpolation)
        top, left = (round((length - self.image_size) / 2.0) for length in size)
        return torch.from_numpy(resized[top : top + self.image_size, left : left + self.image_size]).permute(2, 0, 1)
