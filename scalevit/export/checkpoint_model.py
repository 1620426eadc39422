"""Models with the weights of a checkpoint, ours or DeepSpeed's, as exporters take them.

Must not know in which form a model is written.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalevit.checkpoint.folder import read_record
from scalevit.checkpoint.restore import check_shapes, read_parts
from scalevit.config.base import parse_section
from scalevit.config.model import ModelConfig
from scalevit.config.renamed import refuse_renamed
from scalevit.config.tree import SECTIONS, Config
from scalevit.engines.deepspeed.checkpoints import DeepSpeedCheckpoint
from scalevit.engines.state import TensorSlice
from scalevit.errors import UserError, naming_settings, settings_of
from scalevit.export.base import ModelDescription, Preprocessing
from scalevit.models.build import build_model
from scalevit.models.reductions.apply import parse_reduction
from scalevit.training.open_data import normalisation_of
from scalevit.training.run import with_model_defaults
from scalevit.training.tasks.base import without_own
from scalevit.tying import tied_names


def initial_model(config: Config) -> nn.Module:
    """A config's model for tensors that replace its own: its initial weights are not read. Evaluation mode, on the CPU.

    Raises:
        UserError: timm does not know it, or its reduction does not fit.
    """
    model = config.model.without_weights()
    with naming_settings(SECTIONS):
        return build_model(model, config.reduction, seed=config.seed).eval()


def model_of_checkpoint(
    checkpoint: Path, *, ema: bool, config: Config | None = None
) -> tuple[nn.Module, ModelDescription]:
    """The model of a checkpoint of ours with its weights, or with their EMA.

    Args:
        config: of the run, where its images matter; None takes only the checkpoint's sections of the model, so that the
            others may be of an older version.

    Raises:
        UserError: there is no EMA, the checkpoint cannot be read, or this version builds another model of its config.
    """
    record = read_record(checkpoint)
    part = "ema" if ema else "weights"
    if part not in record["parts"]:
        raise UserError(f"checkpoint {checkpoint}: contains no EMA weights")
    if config is None:
        config = _model_config({key: record["config"].get(key, {}) for key in ("model", "reduction")})
    model = initial_model(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    slices = {name: TensorSlice(torch.empty(shape.numel()), 0, shape) for name, shape in shapes.items()}
    check_shapes(checkpoint, without_own(record["tensors"]), slices)
    read_parts(checkpoint, {part: slices})
    values = {name: own.values for name, own in slices.items()}
    return _filled(model, values, config, classes=record.get("classes"))


def _model_config(sections: Mapping[str, Any]) -> Config:
    """The config of a model alone: the other sections are their defaults, and are not compared with these."""
    refuse_renamed(sections)
    with naming_settings(SECTIONS):
        with settings_of("model"):
            model = parse_section(ModelConfig, sections["model"])
        with settings_of("reduction"):
            reduction = parse_reduction(sections["reduction"])
    return Config().model_copy(update={"model": model, "reduction": reduction})


def model_of_deepspeed(native: DeepSpeedCheckpoint, config: Config) -> tuple[nn.Module, ModelDescription]:
    """The model of a checkpoint that `read_deepspeed_run` read with this config.

    Raises:
        UserError: as `initial_model`.
    """
    return _filled(initial_model(config), native.weights, config)


def _filled(
    model: nn.Module, flat: Mapping[str, Tensor], config: Config, *, classes: Sequence[str] | None = None
) -> tuple[nn.Module, ModelDescription]:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(flat[name].view(parameter.shape))
    preprocessing = preprocessing_of(config)
    return model, ModelDescription(config.model, config.reduction, tied_names(model), preprocessing, classes)


def preprocessing_of(config: Config) -> Preprocessing:
    """What the run's evaluation does to an image."""
    config = with_model_defaults(config)
    data, (mean, std) = config.data, normalisation_of(config)
    assert data.crop_pct is not None, "see with_model_defaults"
    assert data.crop_mode is not None, "see with_model_defaults"
    assert data.interpolation is not None, "see with_model_defaults"
    return Preprocessing(
        image_size=config.model.image_size,
        crop_pct=data.crop_pct,
        interpolation=data.interpolation,
        mean=mean,
        std=std,
        crop_mode=data.crop_mode,
    )
