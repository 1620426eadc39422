"""A sheet of samples as stored, as evaluation sees them, and as training sees them. Knows datasets and transforms.

Images are mixed (mixup, CutMix) per batch and later, so a sheet does not show it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from scalevit.data.faults import Fault
from scalevit.data.images import UndecodableImage, decode
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.readers import SampleReadError
from scalevit.data.shards.index import Index
from scalevit.data.transforms.base import Channels
from scalevit.data.transforms.device import DeviceTransform
from scalevit.randomness import Purpose, row_keys

_CELL, _GAP, _LINE = 168, 8, 18
_PAPER, _INK, _EMPTY = (255, 255, 255), (32, 32, 32), (225, 225, 225)


def spread_over_classes(index: Index, count: int, seed: int = 0) -> list[int]:
    """Samples of as many classes as possible: one of each, then a second, ...; by class."""
    order = np.random.default_rng(seed).permutation(len(index))
    order = order[np.argsort(index.label[order], kind="stable")]
    starts = np.flatnonzero(np.diff(index.label[order], prepend=index.label[order[0]] - 1))
    place_in_class = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    chosen = order[np.argsort(place_in_class, kind="stable")[:count]]
    return sorted(chosen.tolist(), key=lambda sample: (index.label[sample], sample))


def contact_sheet(
    train: ShardDataset,
    evaluation: ShardDataset,
    samples: Sequence[int],
    *,
    copies: int,
    erase: DeviceTransform,
    mean: Channels,
    std: Channels,
) -> Image.Image:
    """Draws a row per sample: as stored, as in evaluation, and augmented copies as in training.

    Args:
        train: with the transform of training.
        evaluation: the same samples with that of evaluation.
        samples: their numbers in the index.
        copies: augmented copies of each.
        erase: random erasing and normalisation, as in training.
        mean, std: of that normalisation, which is undone.

    Raises:
        UserError: a shard is missing, changed or cannot be reached.
    """
    titles = ["as stored", "evaluation", *(f"training {number}" for number in range(1, copies + 1))]
    width = _GAP + len(titles) * (_CELL + _GAP)
    row_height = _LINE + _CELL + _GAP
    sheet = Image.new("RGB", (width, _GAP + _LINE + len(samples) * row_height), _PAPER)
    for column, title in enumerate(titles):
        _write(sheet, (_GAP + column * (_CELL + _GAP), _GAP), title)
    for row, sample in enumerate(samples):
        top = _GAP + _LINE + row * row_height
        stored, caption = _stored(train, sample)
        name = train.index.class_of(int(train.index.label[sample]))
        _write(sheet, (_GAP, top), f"{name}   {train.index.key(sample)}   {caption}")
        cells = [stored, _evaluated(evaluation, sample), *_trained(train, sample, copies, erase, mean, std)]
        for column, cell in enumerate(cells):
            place = _GAP + column * (_CELL + _GAP), top + _LINE
            sheet.paste(_fitted(cell), place)
    return sheet


def _stored(dataset: ShardDataset, sample: int) -> tuple[Image.Image | None, str]:
    """The upright image, and its size or why there is none."""
    try:
        image = decode(dataset.read(sample))
    except (SampleReadError, UndecodableImage) as error:
        return None, f"bad image: {error}"
    return image, f"{image.width} x {image.height}"


def _evaluated(dataset: ShardDataset, sample: int) -> Image.Image | None:
    tensor = dataset.image(sample)
    return None if isinstance(tensor, Fault) else _picture(tensor)


def _trained(
    dataset: ShardDataset, sample: int, copies: int, erase: DeviceTransform, mean: Channels, std: Channels
) -> list[Image.Image | None]:
    """None for each copy of a bad image, whose place another one would take in a run."""
    augmented = dataset.copies(sample, sample, range(copies))
    if augmented.faults:
        return [None] * copies
    rows = np.arange(sample * copies, (sample + 1) * copies)
    normalised = erase(torch.stack(augmented.tensors), row_keys(dataset.seed, Purpose.ERASING, 0, rows))
    scale = torch.tensor(std).view(-1, 1, 1)
    values = (normalised * scale + torch.tensor(mean).view(-1, 1, 1)) * 255
    return [_picture(image) for image in values.round().clamp(0, 255).to(torch.uint8)]


def _picture(tensor: torch.Tensor) -> Image.Image:
    """tensor: (1 or 3, S, S) uint8."""
    return Image.fromarray(tensor.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _fitted(image: Image.Image | None) -> Image.Image:
    cell = Image.new("RGB", (_CELL, _CELL), _EMPTY)
    if image is not None:
        smaller = ImageOps.contain(image, (_CELL, _CELL), Image.Resampling.BICUBIC)
        cell.paste(smaller, ((_CELL - smaller.width) // 2, (_CELL - smaller.height) // 2))
    return cell


def _write(sheet: Image.Image, place: tuple[int, int], text: str) -> None:
    """A line of text, without the characters that Pillow's own font lacks."""
    shown = text.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(sheet).text(place, shown, fill=_INK, font=ImageFont.load_default(13))
