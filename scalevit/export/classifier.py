"""A model that classifies images, from a run, a weights file, a checkpoint or an export. Needs no process group."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalevit.config.tree import SECTIONS, Config
from scalevit.data.transforms.base import Transform
from scalevit.data.transforms.device import DeviceTransform
from scalevit.data.transforms.grey import in_grey
from scalevit.data.transforms.timm_pipeline import evaluation_transform
from scalevit.distributed import World
from scalevit.engines.precision import DTYPES
from scalevit.errors import UserError, naming_settings
from scalevit.export.base import Preprocessing
from scalevit.export.checkpoint_model import preprocessing_of
from scalevit.export.source import Source
from scalevit.export.trained_model import read_model
from scalevit.models.fused_mlp import fuse_mlps
from scalevit.training.open_data import device_transform_of, evaluation_transform_of
from scalevit.training.run import with_model_defaults


@dataclass(frozen=True)
class Classifier:
    """What maps images to logits, and what it does to them before."""

    world: World
    """One process, whose device computes."""
    preprocessing: Preprocessing
    transform: Transform
    """One image, as an evaluation prepares it; gives (3, S, S) uint8."""
    finish: DeviceTransform
    """A batch of those, on the device."""
    num_classes: int
    classes: Sequence[str] | None
    """Names of the labels, where they are known."""
    _logits: Callable[[Tensor], Tensor]
    _autocast: AbstractContextManager[None]

    @property
    def device(self) -> torch.device:
        return self.world.device

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """images: (b, 3, S, S) float32, normalised, on the device -> (b, classes), float32.

        Raises:
            UserError: they are NaN or infinite.
        """
        with self._autocast:
            logits = self._logits(images).float()
        if not torch.isfinite(logits).all():
            raise UserError("the model's outputs are NaN or infinite: its weights are of a run that has diverged")
        return logits


def open_classifier(source: Source) -> Classifier:
    """The classifier of a source, on a GPU where there is one.

    A model of ours is computed as an evaluation of its run computes it; an export as it is.

    Raises:
        UserError: the weights cannot be read or do not fit, or have another classifier.
    """
    world = World.from_environment()
    if source.exporter is not None:
        export = source.exporter.read(source.path, world.device)
        images = export.preprocessing
        return Classifier(
            world=world,
            preprocessing=images,
            transform=_transform(images),
            finish=DeviceTransform(mean=images.mean, std=images.std),
            num_classes=export.num_classes,
            classes=export.classes,
            _logits=export.logits,
            _autocast=nullcontext(),
        )
    model, description = read_model(source)
    return classifier_of(model, description.classes, source.config)


def _transform(images: Preprocessing) -> Transform:
    red, *others = images.mean
    green, blue = others or (red, red)
    transform = evaluation_transform(
        image_size=images.image_size,
        crop_pct=images.crop_pct,
        interpolation=images.interpolation,
        crop_mode=images.crop_mode,
        mean=(red, green, blue),
    )
    return transform if others else in_grey(transform)


def classifier_of(model: nn.Module, classes: Sequence[str] | None, config: Config) -> Classifier:
    """The classifier that a model of ours is, computed as an evaluation of its run computes it.

    Args:
        model: with PyTorch's own modules for its MLPs; is changed.
        classes: names of its labels, if they are known.
        config: of the run.
    """
    world, config = World.from_environment(), with_model_defaults(config)
    with naming_settings(SECTIONS):
        fuse_mlps(model, config.kernels, world.device)
    precision = config.train.precision
    return Classifier(
        world=world,
        preprocessing=preprocessing_of(config),
        transform=evaluation_transform_of(config),
        finish=device_transform_of(config),
        num_classes=config.model.num_classes,
        classes=classes,
        _logits=model.to(world.device).eval(),
        # As the engines do, which have no mixed precision on a CPU other than by autocast.
        _autocast=torch.autocast(world.device.type, DTYPES[precision], enabled=precision != "fp32"),
    )
