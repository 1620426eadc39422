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
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import Compose

from scalevit.data.transforms.base import ArrayTransform, Colour, TrainingAugmentation
from scalevit.data.transforms.fast_ops import Augmentation, augmentation, through_pillow
from scalevit.data.transforms.timm_pipeline import stages
from scalevit.errors import SettingError

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
    """timm's training transform up to the normalisation: (H, W, 3) uint8 to (3, S, S), or (splits, 3, S, S).

    Raises:
        SettingError: as `TimmTraining`.
    """

    def __init__(self, settings: TrainingAugmentation) -> None:
        self.image_size, self.splits = settings.image_size, settings.splits
        self.hflip, self.vflip = settings.hflip, settings.vflip
        base, others, _ = stages(settings)
        # What timm does to the size: RandomResizedCropAndInterpolation, or ResizeKeepRatio and a crop.
        self._sizing, *self._following = base.transforms
        self.modes = _MODES[settings.interpolation]
        self._augmentations: list[Augmentation] = []
        if settings.auto_augment is not None:
            self._augmentations.append(augmentation(settings.auto_augment, settings.image_size, settings.mean))
            others = Compose(others.transforms[1:])
        if others.transforms:
            self._augmentations.append(through_pillow(others))

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """pixels: (H, W, 3) uint8."""
        base = self._resized(pixels)
        # timm draws nothing if the probability is 0.
        if self.hflip > 0 and torch.rand(1) < self.hflip:
            base = torch.from_numpy(base).flip(1).numpy()
        if self.vflip > 0 and torch.rand(1) < self.vflip:
            base = torch.from_numpy(base).flip(0).numpy()
        if not self.splits:
            return _planes(self._augmented(base))
        views = np.stack([base, *(self._augmented(base) for _ in range(self.splits - 1))])
        return torch.from_numpy(views).permute(0, 3, 1, 2)

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        view, side = _planes(pixels), self.image_size
        if isinstance(self._sizing, RandomResizedCropAndInterpolation):
            top, left, height, width = self._sizing.get_params(view, self._sizing.scale, self._sizing.ratio)
            return resize(pixels[top : top + height, left : left + width], (side, side), self._mode())
        of = self._sizing
        height, width = of.get_params(
            view,
            of.size,
            of.longest,
            of.random_scale_prob,
            of.random_scale_range,
            of.random_scale_area,
            of.random_aspect_prob,
            of.random_aspect_range,
        )
        resized = resize(pixels, (height, width), self._mode())
        return np.ascontiguousarray(self._following[0](_planes(resized)).permute(1, 2, 0).numpy())

    def _mode(self) -> str:
        return random.choice(self.modes) if len(self.modes) > 1 else self.modes[0]

    def _augmented(self, pixels: np.ndarray) -> np.ndarray:
        for augment in self._augmentations:
            pixels = augment(pixels)
        return pixels


def _planes(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W), a view."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


class FastEvaluation(ArrayTransform):
    """timm's evaluation transform up to the normalisation, as uint8: resize to image_size / crop_pct, central crop.

    Args:
        image_size: side in pixels.
        crop_pct: central crop over resized side.
        interpolation: bilinear or bicubic.
        crop_mode: as for `evaluation_transform`.
        mean: colour of the border.

    Raises:
        SettingError: `interpolation` is another filter.
    """

    def __init__(
        self,
        *,
        image_size: int,
        crop_pct: float,
        interpolation: str = "bicubic",
        crop_mode: str = "center",
        mean: Colour = IMAGENET_DEFAULT_MEAN,
    ) -> None:
        if interpolation not in _MODES["random"]:
            raise SettingError(
                "interpolation", interpolation, "fast transforms resize by bilinear or bicubic; timm's have others"
            )
        self.image_size, self.interpolation, self.crop_mode = image_size, interpolation, crop_mode
        self.resized_side = math.floor(image_size / crop_pct)
        self._border = [round(255 * channel) for channel in mean]

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """pixels: (H, W, 3) uint8; returns (3, S, S) uint8."""
        resized = resize(pixels, self._size(*pixels.shape[:2]), self.interpolation)
        side, (height, width) = self.image_size, resized.shape[:2]
        if min(height, width) < side:
            canvas = np.empty((max(height, side), max(width, side), 3), np.uint8)
            canvas[:] = self._border
            top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
            canvas[top : top + height, left : left + width] = resized
            resized = canvas
        top, left = (round((length - side) / 2.0) for length in resized.shape[:2])
        return _planes(resized[top : top + side, left : left + side])

    def _size(self, height: int, width: int) -> tuple[int, int]:
        side = self.resized_side
        match self.crop_mode:
            case "squash":
                return side, side
            case "border":
                longest = max(height / side, width / side)
                return round(height / longest), round(width / longest)
        # As torchvision rounds.
        shortest = min(height, width)
        return int(side * height / shortest), int(side * width / shortest)
