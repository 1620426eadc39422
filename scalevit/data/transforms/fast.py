"""The fast path: timm's recipe with the resize in torch on uint8, and what follows the augmentation on the device.

The random draws are timm's, in timm's order, so the same seed crops and flips alike; the resized pixels are within one
level of timm's, and for what differs in the augmentation see `augment_fast`. Pixels stay (H, W, 3) in memory all the
way: what seems transposed below is a view. Plain values in, callables out. Must not know files or orders.
"""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import ColorJitter

from scalevit.data.loading.dataset import PixelTransform
from scalevit.data.transforms.fast_ops import Augmentation, augmentation, through_pillow
from scalevit.data.transforms.timm_pipeline import Channels

_MODES = {"bilinear": ("bilinear",), "bicubic": ("bicubic",), "random": ("bilinear", "bicubic")}


def resize(pixels: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Pillow's resampling within one level, in a fifth of its time (enlarging by bicubic is Pillow's own).

    Args:
        pixels: (H, W, 3) uint8, may be a view.
        size: (height, width) to get.
        mode: bilinear or bicubic.

    Returns:
        (height, width, 3) uint8.
    """
    if pixels.shape[:2] == size:
        return np.ascontiguousarray(pixels)
    # Of a view, or without channels-last strides in all four dimensions, torch makes planes, which takes far longer.
    image = torch.from_numpy(pixels).contiguous()[None].permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=size, mode=mode, antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()


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
        self.augment: Augmentation | None = None
        if auto_augment is not None:
            self.augment = augmentation(auto_augment, image_size, mean)
        elif color_jitter:
            self.augment = through_pillow(ColorJitter(*[color_jitter] * 3))

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """pixels: (H, W, 3) uint8; returns (3, S, S) uint8."""
        view = torch.from_numpy(pixels).permute(2, 0, 1)
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(view, self.crop_scale, self.crop_ratio)
        mode = random.choice(self.modes) if len(self.modes) > 1 else self.modes[0]
        side = self.image_size
        shown = resize(pixels[top : top + height, left : left + width], (side, side), mode)
        # timm makes no draw where there is no flip.
        if self.hflip > 0 and torch.rand(1) < self.hflip:
            shown = torch.from_numpy(shown).flip(1).numpy()
        if self.augment is not None:
            shown = self.augment(shown)
        return torch.from_numpy(shown).permute(2, 0, 1)


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
        return torch.from_numpy(shown[top : top + self.image_size, left : left + self.image_size]).permute(2, 0, 1)


class Finish:
    """What follows a transform, for a whole batch and on its device: normalisation and random erasing.

    Draws from numpy's global generator and torch's: the training loop seeds both for each micro-batch.

    Args:
        mean, std: of the normalisation, for values in 0..1.
        random_erasing: probability of one rectangle of normal noise per image (timm's pixel mode).
    """

    def __init__(self, *, mean: Channels, std: Channels, random_erasing: float = 0.0) -> None:
        self.random_erasing = random_erasing
        # (x / 255 - mean) / std as one multiplication and one addition.
        self._factor = torch.tensor([1 / (255 * s) for s in std])
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])

    def __call__(self, images: Tensor) -> Tensor:
        """images: (m, 3, S, S) uint8; returns them as float32, in the same memory format."""
        factor, shift = self._factor.to(images.device), self._shift.to(images.device)
        if images.is_contiguous(memory_format=torch.channels_last):
            # By rows: element by element, a broadcast along the innermost three takes ten times as long on a CPU.
            side = images.shape[3]
            rows = images.permute(0, 2, 3, 1).flatten(2).to(torch.float32)
            torch.addcmul(shift.repeat(side), rows, factor.repeat(side), out=rows)
            finished = rows.unflatten(2, (side, 3)).permute(0, 3, 1, 2)
        else:
            finished = images.to(torch.float32).mul_(factor.view(3, 1, 1)).add_(shift.view(3, 1, 1))
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
