"""Metrics of a classifier on the validation images of a config, in one process."""

import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from torch import nn

from scalevit.config.tree import SECTIONS, Config
from scalevit.data.loading.evaluation_loader import EvaluationLoader
from scalevit.data.shards.discovery import class_names, find_shards
from scalevit.errors import UserError, naming_settings
from scalevit.export.classifier import Classifier, classifier_of
from scalevit.models.build import build_model
from scalevit.models.weights.read import read_classes
from scalevit.training.evaluation import CheckedMetrics, measure_within_limit
from scalevit.training.open_data import open_evaluation
from scalevit.training.setting_keys import naming_data_settings


def measure_classifier(classifier: Classifier, config: Config) -> CheckedMetrics:
    """Every metric of the validation set, and its bad samples.

    Args:
        config: of the data. Where it leaves open how images are prepared, the classifier's own way is taken.

    Raises:
        UserError: a shard is missing or cannot be read, a label is not one of the classifier's, or there are too many
            bad samples.
    """
    loader = _validation_of(classifier, config)
    return measure_within_limit(classifier.logits, classifier.world, loader, max_faults=config.data.max_faults)


def measure_model(model: nn.Module, classes: Sequence[str] | None, config: Config) -> CheckedMetrics:
    """Likewise of a model of ours, which stays as it is.

    Args:
        model: with PyTorch's own modules for its MLPs.
        classes: names of its labels, if they are known.
        config: of the data, the kernels and the precision.
    """
    return measure_classifier(classifier_of(deepcopy(model), classes, config), config)


def measure_weights(config: Config) -> CheckedMetrics | None:
    """The metrics of `model.initial_weights` over the validation set, as `scalevit evaluate` gives them on one rank.

    Without the engine of the run: DeepSpeed's starts once in a process.

    Returns:
        None where there are no validation shards.

    Raises:
        UserError: the shards cannot be used.
    """
    if config.data.builtin is None:
        try:
            find_shards(config.data.validation)
        except UserError:  # which a reduction does not need
            return None
    with naming_settings(SECTIONS):
        model = build_model(config.model, config.reduction, seed=config.seed, need_classifier=True)
    return measure_model(model, read_classes(Path(str(config.model.initial_weights))), config)


def _validation_of(classifier: Classifier, config: Config) -> EvaluationLoader:
    """The validation images of a config, prepared for a classifier; see `measure_classifier`."""
    world, images = classifier.world, classifier.preprocessing
    if world.size > 1:
        raise UserError("this is computed in one process: start it without a launcher")
    data = config.data
    preparation = {
        "mean": data.mean or images.mean,
        "std": data.std or images.std,
        "crop_pct": data.crop_pct or images.crop_pct,
        "crop_mode": data.crop_mode or images.crop_mode,
        "interpolation": data.interpolation or images.interpolation,
    }
    size = {"image_size": images.image_size, "num_classes": classifier.num_classes}
    config = config.model_copy(
        update={
            "data": data.model_copy(update=preparation),
            "model": config.model.model_copy(update=size),
        }
    )
    with naming_data_settings():
        if classifier.classes is None and class_names(find_shards(config.data.validation)) is not None:
            print(
                "warning: the model names no classes: labels of the validation images are taken as they are numbered",
                file=sys.stderr,
            )
        return open_evaluation(config, world, classes=classifier.classes)
