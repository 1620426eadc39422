"""timm's transforms for training and evaluation up to uint8, and mixup / CutMix of a batch.

As with timm's prefetcher, normalisation and random erasing are done for whole batches on their device, by
`transforms_fast.Finish`.

Plain values in, callables out. Knows timm and tensors; must not know files, orders or configs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target

from scalevit.errors import UserError

Transform = Callable[[Image.Image], torch.Tensor]
Channels = tuple[float, float, float]


def training_transform(
    *,
    image_size: int,
    mean: Channels,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    color_jitter: float = 0.4,
    auto_augment: str | None = None,
    interpolation: str = "random",
) -> Transform:
    """timm's training transform: an RGB image to a (3, image_size, image_size) uint8 tensor.

    Args:
        image_size: side in pixels.
        mean: fills what a rotation leaves empty, as values in 0..1.
        crop_scale: area of the random crop relative to the image.
        crop_ratio: aspect ratio of the crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength, not used together with auto_augment.
        auto_augment: timm's policy, e.g. "rand-m9-mstd0.5-inc1".
        interpolation: bilinear, bicubic or random.

    Raises:
        UserError: a policy that timm does not know.
    """

    def create() -> Transform:
        return create_transform(
            image_size,
            is_training=True,
            scale=crop_scale,
            ratio=crop_ratio,
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            interpolation=interpolation,
            mean=mean,
            use_prefetcher=True,
        )

    with known_policy(auto_augment):
        return create()


@contextmanager
def known_policy(policy: str | None) -> Iterator[None]:
    """Tells a policy that timm does not know as the user's mistake; timm checks by asserts, look-ups and conversions.

    Raises:
        UserError: what the block raises for such a policy.
    """
    try:
        yield
    except (AssertionError, KeyError, ValueError) as error:
        if policy is None:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.augmentation.auto_augment = {policy!r} is no policy of timm ({reason}); "
            "for example 'rand-m9-mstd0.5-inc1'"
        ) from None


def evaluation_transform(*, image_size: int, crop_pct: float, interpolation: str = "bicubic") -> Transform:
    """timm's evaluation transform: resize to image_size / crop_pct and central crop, as uint8.

    Args:
        image_size: side in pixels.
        crop_pct: central crop over resized side.
        interpolation: bilinear or bicubic.
    """
    return create_transform(image_size, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True)


class Mix:
    """Mixup, CutMix and label smoothing of a micro-batch, on its device; row j mixes with row m-1-j.

    Draws from numpy's global generator: the training loop seeds it for each micro-batch.

    Args:
        mixup: alpha of mixup's Beta distribution; 0 turns it off.
        cutmix: alpha of CutMix; with both on, each batch takes one of the two.
        probability: that a batch is mixed at all.
        label_smoothing: share of the target that is spread over all classes.
        num_classes: width of the targets.
    """

    def __init__(
        self, *, mixup: float, cutmix: float, probability: float, label_smoothing: float, num_classes: int
    ) -> None:
        self.label_smoothing, self.num_classes = label_smoothing, num_classes
        self._mixup: Mixup | None = None
        if probability and (mixup or cutmix):
            self._mixup = Mixup(mixup, cutmix, None, probability, 0.5, "batch", True, label_smoothing, num_classes)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixes images (m, 3, S, S) in place; labels (m,) int64 become soft targets (m, num_classes) float32.

        Raises:
            UserError: an odd micro-batch cannot be mixed.
        """
        if self._mixup is None:
            return images, mixup_target(labels, self.num_classes, smoothing=self.label_smoothing)
        if len(images) % 2:
            raise UserError(f"train.micro_batch = {len(images)} must be even for mixup and cutmix")
        return self._mixup(images, labels)
