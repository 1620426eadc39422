"""The fast path: timm's recipe with the resize in torch on uint8, and what follows the augmentation on the device.

The random draws are timm's, in timm's order, so the same seed crops and flips alike; the resized pixels are within one
level of timm's. Two things differ by design: RandAugment's rotation and shear are always bilinear (timm draws bilinear
or bicubic), and its translation is by whole pixels. Plain values in, callables out. Must not know files or orders.
"""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment as timm_augment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import ColorJitter

from scalevit.data.dataset import PixelTransform
from scalevit.data.transforms import Channels, known_policy

_MODES = {"bilinear": ("bilinear",), "bicubic": ("bicubic",), "random": ("bilinear", "bicubic")}


def resize(pixels: np.ndarray, size: tuple[int, int], mode: str) -> Tensor:
    """Pillow's resampling within one level, in a third of its time (enlarging by bicubic is Pillow's own).

    Args:
        pixels: (H, W, 3) uint8, may be a view.
        size: (height, width) to get.
        mode: bilinear or bicubic.

    Returns:
        (3, height, width) uint8.
    """
    if pixels.shape[:2] == size:
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    if mode == "bicubic" and (pixels.shape[0] < size[0] or pixels.shape[1] < size[1]):
        # torch's 16-bit weights are off by two levels at hard edges here.
        enlarged = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(enlarged)).permute(2, 0, 1)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.interpolate(image, size=size, mode=mode, antialias=True, align_corners=False)[0]


class FastTraining(PixelTransform):
    """timm's training transform up to the augmentation: (H, W, 3) uint8 to (3, image_size, image_size) uint8.

    Args:
        image_size: side in pixels.
        crop_scale: area of the random crop relative to the image.
        crop_ratio: aspect ratio of the crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength, not used together with auto_augment.
        auto_augment: timm's policy, e.g. "rand-m9-mstd0.5-inc1".
        interpolation: bilinear, bicubic or random.
        mean: fills what a rotation leaves empty.

    Raises:
        UserError: a policy that timm does not know.
    """

    def __init__(
        self,
        *,
        image_size: int,
        mean: Channels,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        color_jitter: float = 0.4,
        auto_augment: str | None = None,
        interpolation: str = "random",
    ) -> None:
        self.image_size, self.hflip = image_size, hflip
        self.crop_scale, self.crop_ratio = crop_scale, crop_ratio
        self.modes = _MODES[interpolation]
        self.augment: Callable[[Image.Image], Image.Image] | None = None
        if auto_augment is not None:
            self.augment = _augmentation(auto_augment, image_size, mean)
        elif color_jitter:
            self.augment = ColorJitter(*[color_jitter] * 3)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """pixels: (H, W, 3) uint8; returns (3, S, S) uint8."""
        view = torch.from_numpy(pixels).permute(2, 0, 1)
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(view, self.crop_scale, self.crop_ratio)
        mode = random.choice(self.modes) if len(self.modes) > 1 else self.modes[0]
        side = self.image_size
        shown = resize(pixels[top : top + height, left : left + width], (side, side), mode)
        # timm makes no draw where there is no flip.
        if self.hflip > 0 and torch.rand(1) < self.hflip:
            shown = shown.flip(2)
        if self.augment is not None:
            image = Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())
            augmented = self.augment(image)
            if augmented is not image:
                shown = torch.from_numpy(np.array(augmented)).permute(2, 0, 1)
        return shown


class FastEvaluation(PixelTransform):
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
        # torchvision's rounding, of both the resize and the central crop.
        size = int(side * height / shortest), int(side * width / shortest)
        shown = resize(pixels, size, self.interpolation)
        top, left = (round((length - self.image_size) / 2.0) for length in size)
        return shown[:, top : top + self.image_size, left : left + self.image_size].contiguous()


class Finish:
    """What follows a transform, for a whole batch and on its device: normalisation and random erasing.

    Draws from numpy's global generator and torch's: the training loop seeds both for each micro-batch. Batches that
    are float already pass unchanged, so a loop may call it whatever made the batch.

    Args:
        mean, std: of the normalisation, for values in 0..1.
        random_erasing: probability of one rectangle of normal noise per image (timm's pixel mode).
    """

    def __init__(self, *, mean: Channels, std: Channels, random_erasing: float = 0.0) -> None:
        self.random_erasing = random_erasing
        # (x / 255 - mean) / std as one multiplication and one addition.
        self._factor = torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """images: (m, 3, S, S) uint8; returns them as float32, in the same memory format."""
        if images.is_floating_point():
            return images
        if self._factor.device != images.device:
            self._factor, self._shift = self._factor.to(images.device), self._shift.to(images.device)
        finished = images.to(torch.float32).mul_(self._factor).add_(self._shift)
        for image in finished if self.random_erasing else ():
            if np.random.random() < self.random_erasing:
                _erase(image)
        return finished


def _erase(image: Tensor) -> None:
    """timm's RandomErasing with its default sizes: 2 to 33 % of the area, aspect ratios from 0.3 to 1 / 0.3."""
    _, height, width = image.shape
    for _ in range(10):
        area = np.random.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(np.random.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = np.random.randint(height - h + 1), np.random.randint(width - w + 1)
            image[:, top : top + h, left : left + w] = torch.randn(3, h, w, device=image.device)
            return


def _augmentation(policy: str, image_size: int, mean: Channels) -> Callable[[Image.Image], Image.Image]:
    """timm's policy with its own arguments, of which only the resampling differs."""
    arguments = {
        "translate_const": int(image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
        "interpolation": Image.Resampling.BILINEAR,
    }
    with known_policy(policy):
        if policy.startswith("rand"):
            augmentation = timm_augment.rand_augment_transform(policy, arguments)
            for operation in augmentation.ops:
                if operation.aug_fn in _WHOLE_PIXELS:
                    operation.aug_fn = _WHOLE_PIXELS[operation.aug_fn]
            return augmentation
        if policy.startswith("augmix"):
            return timm_augment.augment_and_mix_transform(policy, {**arguments, "translate_pct": 0.3})
        return timm_augment.auto_augment_transform(policy, arguments)


def _shift(image: Image.Image, right: float, down: float, fill: tuple[int, int, int]) -> Image.Image:
    matrix = (1, 0, round(right), 0, 1, round(down))
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.NEAREST, fillcolor=fill
    )


def _translate_x(image: Image.Image, share: float, fillcolor: tuple[int, int, int], resample: int) -> Image.Image:
    return _shift(image, share * image.size[0], 0, fillcolor)


def _translate_y(image: Image.Image, share: float, fillcolor: tuple[int, int, int], resample: int) -> Image.Image:
    return _shift(image, 0, share * image.size[1], fillcolor)


_WHOLE_PIXELS = {timm_augment.translate_x_rel: _translate_x, timm_augment.translate_y_rel: _translate_y}
