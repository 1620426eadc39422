"""Images on which trained models are fitted and measured: read once by position, kept in memory, handed out in batches.

Knows the data of a run. Must not know what is measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scalevit.config.tree import Config
from scalevit.data.faults import Fault
from scalevit.data.order.shuffle import Order
from scalevit.data.transforms.device import DeviceTransform
from scalevit.training.open_data import device_transform_of, open_unaugmented
from scalevit.training.setting_keys import naming_data_settings


class LabelledBatch(NamedTuple):
    """On the device of the model."""

    images: Tensor
    """(b, 3, S, S) float32, normalised."""
    labels: Tensor
    """(b,) int64."""


@dataclass(frozen=True)
class Samples:
    """Some images of a set, transformed as for an evaluation."""

    images: Tensor
    """(N, 3, S, S) on the CPU, before the part of the transform that is done on the device."""
    labels: Tensor
    """(N,) int64."""
    faults: Sequence[Fault]
    """Bad samples, for which others of the set were taken."""
    finish: DeviceTransform
    device: torch.device
    batch: int
    """Images of a forward pass."""

    def __len__(self) -> int:
        return len(self.images)

    def batches(self) -> Iterator[LabelledBatch]:
        """All of them, in the same order at every call."""
        for images, labels in zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True):
            yield LabelledBatch(self.finish(images.to(self.device)), labels.to(self.device))

    def image_batches(self) -> Iterator[Tensor]:
        """Their images only."""
        return (batch.images for batch in self.batches())


def read_samples(
    config: Config, path: str, count: int, device: torch.device, *, classes: Sequence[str] | None = None
) -> Samples:
    """The images at the first positions of the order of a run with this seed, without augmentation.

    Args:
        config: with its model's defaults.
        path: `data.train` or `data.validation`.
        count: of images; the whole set if it has fewer.
        device: of the model.
        classes: names of the labels that the model was trained with, if they are known.

    Raises:
        UserError: shards are missing or damaged, or too many samples in a row are bad.
    """
    with naming_data_settings():
        dataset = open_unaugmented(config, path, classes=classes)
        positions = np.arange(min(count, len(dataset)))
        images, labels, faults = [], [], []
        for position, number in zip(positions, Order(len(dataset), config.seed).ids(positions), strict=True):
            copies = dataset.copies(int(number), int(position), [0])
            images.append(copies.tensors[0])
            labels.append(int(dataset.index.label[copies.sample]))
            faults += copies.faults
    finish = device_transform_of(config)
    return Samples(torch.stack(images), torch.tensor(labels), faults, finish, device, config.evaluation.batch)
