"""The model of a source (a run, a weights file or a checkpoint) with its weights, as exporters and averages take it.

Must not know in which form a model is written.
"""

from dataclasses import replace

from torch import nn

from scalevit.config.tree import SECTIONS
from scalevit.errors import UserError, naming_settings
from scalevit.export.base import ModelDescription
from scalevit.export.checkpoint_model import model_of_checkpoint, preprocessing_of
from scalevit.export.source import Source
from scalevit.models.build import build_model
from scalevit.models.nested import cut_to_width
from scalevit.models.weights.read import read_classes
from scalevit.tying import tied_names


def read_model(source: Source) -> tuple[nn.Module, ModelDescription]:
    """The model on the CPU, in evaluation mode, with PyTorch's own modules for its MLPs.

    Raises:
        UserError: the weights cannot be read or do not fit, or the source is an export.
    """
    if source.exporter is not None:
        raise UserError(f"{source.path}: is an export (--to {source.exporter.name}): name the run or its weights")
    if source.part is not None:
        return model_of_checkpoint(source.path, ema=source.part == "ema", config=source.config)
    config = source.config
    with naming_settings(SECTIONS):
        model = build_model(config.model, config.reduction, seed=config.seed, need_classifier=True).eval()
    description = ModelDescription(
        model=config.model,
        reduction=config.reduction,
        tied=tied_names(model),
        preprocessing=preprocessing_of(config),
        classes=read_classes(source.path),
    )
    return model, description


def cut(model: nn.Module, description: ModelDescription, width: float) -> ModelDescription:
    """Removes the hidden units beyond a width, in place, of a model that was trained at several (`nested_width`).

    Returns:
        The description of the model as it is now.

    Raises:
        SettingError: the "width" leaves no units, or is above 1.
        UserError: no settings build such a model.
    """
    settings, reduction = cut_to_width(model, width, description=description.model, reduction=description.reduction)
    return replace(description, model=settings, reduction=reduction)
