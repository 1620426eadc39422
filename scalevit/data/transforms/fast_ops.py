"""timm's augmentation policies on arrays: the same draws and pixels, in a third of the time.

timm's operations work on Pillow images, where looking up a pixel takes longer than the arithmetic does in numpy. Each
operation here takes and returns (H, W, 3) uint8, and the pixels are timm's (after a shear, within one level). Two
things differ by design: rotation and shear are always bilinear (timm draws bilinear or bicubic), and translation is by
whole pixels. Operations without a faster version use Pillow. Must not know datasets or tensors.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from timm.data import auto_augment

from scalevit.data.transforms.base import Colour
from scalevit.data.transforms.timm_pipeline import valid_policy

Augmentation = Callable[..., np.ndarray]
Fill = tuple[int, int, int]


def augmentation(policy: str, image_size: int, mean: Colour) -> Augmentation:
    """timm's policy on (H, W, 3) uint8.

    Args:
        policy: timm's, e.g. "rand-m9-mstd0.5-inc1".
        image_size: side in pixels, for translations.
        mean: colour of the pixels that a rotation leaves empty.

    Raises:
        SettingError: `auto_augment` is not a timm policy.
    """
    arguments = {
        "translate_const": int(image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
        "interpolation": Image.Resampling.BILINEAR,
    }
    with valid_policy(policy):
        if policy.startswith("rand"):
            random_augment = auto_augment.rand_augment_transform(policy, arguments)
            operations = random_augment.ops
        elif policy.startswith("augmix"):
            # It blends Pillow images between its operations.
            return through_pillow(auto_augment.augment_and_mix_transform(policy, {**arguments, "translate_pct": 0.3}))
        else:
            random_augment = auto_augment.auto_augment_transform(policy, arguments)
            operations = [operation for group in random_augment.policy for operation in group]
    for operation in operations:
        operation.aug_fn = _ON_ARRAYS.get(operation.aug_fn) or through_pillow(operation.aug_fn)
    return random_augment


def through_pillow(function: Callable[..., Image.Image]) -> Augmentation:
    """Turns an operation on Pillow images into one on arrays."""
    return partial(_through_pillow, function)


def _through_pillow(function: Callable[..., Image.Image], pixels: np.ndarray, *arguments: Any, **named: Any) -> Any:
    image = Image.fromarray(pixels)
    changed = function(image, *arguments, **named)
    return pixels if changed is image else np.array(changed)


# --- operations on single values --------------------------------------------------------------------------


def _invert(pixels: np.ndarray, **_: Any) -> np.ndarray:
    return np.invert(pixels)


def _posterize(pixels: np.ndarray, bits: int, **_: Any) -> np.ndarray:
    return pixels if bits >= 8 else pixels & np.uint8(256 - (1 << (8 - bits)))


def _solarize(pixels: np.ndarray, threshold: int, **_: Any) -> np.ndarray:
    # Inverts where the comparison gives 1, whose negative has all bits set.
    return pixels ^ np.negative((pixels >= threshold).view(np.uint8))


def _solarize_add(pixels: np.ndarray, add: int, **_: Any) -> np.ndarray:
    # add is at most 128, so that no sum exceeds 255.
    return pixels + (pixels < 128) * np.uint8(add)


def _brightness(pixels: np.ndarray, factor: float, **_: Any) -> np.ndarray:
    return _looked_up(pixels, _blend(np.zeros(256, np.uint8), _VALUES, factor))


def _contrast(pixels: np.ndarray, factor: float, **_: Any) -> np.ndarray:
    grey = int(np.asarray(Image.fromarray(pixels).convert("L")).mean() + 0.5)
    return _looked_up(pixels, _blend(np.full(256, grey, np.uint8), _VALUES, factor))


def _auto_contrast(pixels: np.ndarray, **_: Any) -> np.ndarray:
    rows = pixels.reshape(len(pixels), -1)
    low, high = rows.min(0).reshape(-1, 3).min(0), rows.max(0).reshape(-1, 3).max(0)
    if not low.any() and (high == 255).all():
        return pixels
    scale = 255.0 / np.maximum(high - low, 1)
    tables = np.clip(_VALUES * scale[:, None] - (low * scale)[:, None], 0, 255).astype(np.uint8)
    tables[high == low] = _VALUES
    return np.array(Image.fromarray(pixels).point(tables.ravel().tolist()))


_VALUES = np.arange(256, dtype=np.uint8)


def _looked_up(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    # numpy's own indexing takes 1.5 to 2.5 times as long.
    return np.frombuffer(bytearray(pixels).translate(table.tobytes()), np.uint8).reshape(pixels.shape)


def _blend(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
    """Pillow's `Image.blend`, bit for bit: truncated, and clipped if the factor is outside 0..1."""
    return _mix(start, end, np.float32(factor), clip=not 0 <= factor <= 1)


def _mix(start: np.ndarray, end: np.ndarray, weight: Any, *, clip: bool = False) -> np.ndarray:
    mixed = (end.astype(np.int16) - start) * weight
    mixed += start
    if clip:
        np.clip(mixed, 0, 255, out=mixed)
    return mixed.astype(np.uint8)


# --- operations on neighbourhoods -------------------------------------------------------------------------


def _sharpness(pixels: np.ndarray, factor: float, **_: Any) -> np.ndarray:
    """Blends with Pillow's SMOOTH filter (weight 5 and eight neighbours of weight 1, over 13), except at the border."""
    wide = pixels.astype(np.uint16)
    columns = wide[:-2] + wide[1:-1]
    columns += wide[2:]
    total = columns[:, :-2] + columns[:, 1:-1]
    total += columns[:, 2:]
    total += 4 * wide[1:-1, 1:-1]
    total += 6  # rounds
    total //= 13
    wide[1:-1, 1:-1] = total
    return _blend(wide.view(np.int16), pixels, factor)


def _shear_x(pixels: np.ndarray, factor: float, fillcolor: Fill, **_: Any) -> np.ndarray:
    """The pixel at (x, y) is interpolated at (x + factor * (y + 0.5), y), between two neighbours in the row."""
    height, width, channels = pixels.shape
    shifts = factor * (np.arange(height) + 0.5)
    whole = np.floor(shifts).astype(np.int64)
    margin = int(np.abs(whole).max()) + 2
    rows = np.empty((height, width + 2 * margin, channels), np.uint8)
    rows[:, margin : margin + width] = pixels
    rows[:, margin - 1], rows[:, margin + width] = pixels[:, 0], pixels[:, -1]
    # All windows of a row's length in the padded rows; one gather takes the window that each row needs.
    runs = np.lib.stride_tricks.sliding_window_view(rows.reshape(-1), width * channels)
    starts = (np.arange(height) * rows.shape[1] + margin + whole) * channels
    weights = (shifts - whole).astype(np.float32)[:, None]
    mixed = _mix(runs[starts], runs[starts + channels], weights)
    # Negative coordinates wrap around to large unsigned numbers, so one comparison finds both sides.
    nearest = np.floor(shifts + 0.5).astype(np.int16)[:, None] + np.arange(width, dtype=np.int16).repeat(channels)
    hidden = np.negative((nearest.view(np.uint16) >= width).view(np.uint8))
    fill = np.tile(np.array(fillcolor, np.uint8), width)
    return ((mixed & ~hidden) | (fill & hidden)).reshape(pixels.shape)


def _shear_y(pixels: np.ndarray, factor: float, **named: Any) -> np.ndarray:
    return _transposed(_shear_x(_transposed(pixels), factor, **named))


def _transposed(pixels: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(pixels).transpose(Image.Transpose.TRANSPOSE))


def _translate_x(pixels: np.ndarray, share: float, fillcolor: Fill, **_: Any) -> np.ndarray:
    source, target = _overlap(round(share * pixels.shape[1]))
    moved = _filled(pixels.shape, fillcolor)
    moved[:, target] = pixels[:, source]
    return moved


def _translate_y(pixels: np.ndarray, share: float, fillcolor: Fill, **_: Any) -> np.ndarray:
    source, target = _overlap(round(share * pixels.shape[0]))
    moved = _filled(pixels.shape, fillcolor)
    moved[target] = pixels[source]
    return moved


def _overlap(by: int) -> tuple[slice, slice]:
    """Source and target of the pixels that stay visible when the image moves back by `by` pixels."""
    return (slice(by, None), slice(None, -by)) if by > 0 else (slice(None, by or None), slice(-by, None))


def _filled(shape: tuple[int, ...], fill: Fill) -> np.ndarray:
    filled = np.empty(shape, np.uint8)
    filled[:] = np.tile(np.array(fill, np.uint8), (shape[1], 1))  # by rows: fifty times as fast as by pixels
    return filled


_ON_ARRAYS: dict[Callable[..., Any], Augmentation] = {
    auto_augment.invert: _invert,
    auto_augment.posterize: _posterize,
    auto_augment.solarize: _solarize,
    auto_augment.solarize_add: _solarize_add,
    auto_augment.brightness: _brightness,
    auto_augment.contrast: _contrast,
    auto_augment.auto_contrast: _auto_contrast,
    auto_augment.sharpness: _sharpness,
    auto_augment.shear_x: _shear_x,
    auto_augment.shear_y: _shear_y,
    auto_augment.translate_x_rel: _translate_x,
    auto_augment.translate_y_rel: _translate_y,
}
