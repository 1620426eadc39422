"""The loss of a distillation: that of the labels plus the distance from the teacher.

The formulas are those of timm's LogitDistillationTask, TokenDistillationTask and FeatureDistillationTask, for each
image so that its weight counts.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from scalevit.distributed import World
from scalevit.engines.frozen import FrozenModule
from scalevit.errors import SettingError
from scalevit.randomness import Purpose, hash64
from scalevit.training.open_data import normalisation_of
from scalevit.training.tasks.base import DeviceBatch, Forward, TaskLoss, TaskRunner
from scalevit.training.tasks.distillation.teacher import (
    Teacher,
    feature_width,
    logits_and_features,
    pooled_features,
    renormalisation,
)
from scalevit.training.tasks.divergence import softened_divergence

if TYPE_CHECKING:
    from scalevit.config.tree import Config
    from scalevit.training.tasks.distillation.task import DistillationTask


class DistillationRunner(TaskRunner):
    """One forward pass of the teacher and one of the student."""

    def __init__(self, settings: "DistillationTask", config: "Config", world: World, teacher: Teacher):
        self._settings, self._config, self._world, self._teacher = settings, config, world, teacher
        self._normalised = normalisation_of(config)
        self._frozen: Any = None
        self._affine: Tensor | None = None
        self.fingerprint = {"teacher.digest": teacher.digest}
        self.summary = (
            f"distillation ({settings.method}) from {teacher.name}, {teacher.parameters:,} parameters, "
            f"digest {teacher.digest[:12]}"
        )

    def extend(self, model: nn.Module) -> None:
        student: Any = model
        if self._settings.method == "token":
            if not hasattr(student, "set_distilled_training"):
                found = self._config.model.name
                raise SettingError(
                    "method", "token", f"needs a model with a distillation token (deit_*_distilled_*), not {found}"
                )
            student.set_distilled_training(True)
        if self._settings.method == "features":
            self._compare_features(student)

    def _compare_features(self, student: Any) -> None:
        """Has the student return its features in training, projected if there are not as many as the teacher's."""
        own, wanted = feature_width(student), feature_width(self._teacher.module)
        if own != wanted:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(hash64(self._config.seed, int(Purpose.PROJECTION)) >> 1)
                student.task = nn.ModuleDict({"projection": nn.Linear(own, wanted)})
        student.forward = partial(logits_and_features, student)

    def start(self, model: nn.Module) -> None:
        if self._frozen is not None:
            return
        teacher = self._teacher
        if self._settings.method == "features":
            teacher.module.forward = partial(pooled_features, teacher.module)
        affine = renormalisation(self._normalised, (teacher.mean, teacher.std))
        self._affine = None if affine is None else torch.tensor(affine, device=self._world.device).view(2, 1, -1, 1, 1)
        units = teacher.units if self._settings.teacher.sharded else None
        self._frozen = FrozenModule(teacher.module, self._world, precision=self._config.train.precision, units=units)

    def loss(self, forward: Forward, batch: DeviceBatch, index: int) -> TaskLoss:
        settings = self._settings
        with record_function("teacher"):
            taught = self._frozen(self._images_of_teacher(batch.images)).float()
        returned = forward(batch.images)
        logits, compared = returned if settings.method != "logits" else (returned, returned)
        distance = self._distance(compared.float(), taught)
        labels = self._config.loss.weighted_sum(logits.float(), batch.labels, batch.weights)
        # Rows that fill up a batch have weight 0.
        distillation = (distance * batch.weights).sum()
        total = settings.label_weight * labels + settings.distillation_weight * distillation
        return TaskLoss(total, {"labels": labels, "distillation": distillation})

    def _images_of_teacher(self, images: Tensor) -> Tensor:
        if self._affine is None:
            return images
        factors, summands = self._affine
        return images * factors + summands

    def _distance(self, own: Tensor, taught: Tensor) -> Tensor:
        """(b, classes or features) each -> (b,)."""
        settings = self._settings
        if settings.method == "features":
            if settings.feature_loss == "cosine":
                return 1.0 - F.cosine_similarity(own, taught, dim=1)
            return F.mse_loss(own, taught, reduction="none").mean(1)
        if settings.hard_targets:
            return F.cross_entropy(own, taught.argmax(1), reduction="none")
        return softened_divergence(own, taught, settings.temperature)
