"""Distillation from a teacher: its logits (arXiv:1503.02531), DeiT's token (arXiv:2012.12877), or its features.

Settings only; `runner` computes the loss and `teacher` loads the teacher.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat, model_validator

from scalevit.config.base import FilePath, NonNegativeFloat, Section
from scalevit.training.tasks.base import Task

if TYPE_CHECKING:
    from scalevit.config.tree import Config
    from scalevit.distributed import World
    from scalevit.training.tasks.distillation.runner import DistillationRunner


class TeacherSettings(Section):
    """The model that is imitated. It sees the same images as the student, mixed and erased like them."""

    name: str | None = None
    """timm's name of the teacher, of any family: its pretrained weights, or those in `weights`. null: the model is the
    one that `weights` say they are of."""
    weights: FilePath | None = None
    """A weights file of a run (the model and its reduction are read from it), a folder of the Hugging Face form (as
    `scalevit export --to huggingface` writes it), or with `name` a plain state dict."""
    pretrained: bool = True
    """Whether a teacher by name without `weights` is timm's pretrained one; false initialises it, to try speed and
    memory."""
    kwargs: dict[str, Any] = {}
    """More arguments of timm's factory for a teacher by name, for example {"global_pool": "avg"}."""
    mean: tuple[float, float, float] | None = None
    """Mean that the teacher's images are normalised by; null takes that of its run (the config.json beside its weights)
    or timm's for the model. Images of a student with
    another normalisation are converted on the device."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation, likewise."""
    sharded: bool = False
    """Whether the ranks share one copy of the teacher (FSDP2), each part gathered when it computes; false holds the
    whole teacher on every rank. Works with every engine."""


class DistillationTask(Task):
    """The loss of the labels plus the distance from a teacher."""

    name: Literal["distillation"] = "distillation"
    method: Literal["logits", "token", "features"] = "logits"
    """logits: divergence of the student's softened predictions from the teacher's. token: likewise, for the second head
    of a student with a distillation token (deit_*_distilled_*). features: distance of the features before the
    classifier, projected linearly where the student's are not as many."""
    teacher: TeacherSettings = TeacherSettings()
    temperature: PositiveFloat = 1.0
    """Both predictions are divided by it (logits, token)."""
    hard_targets: bool = False
    """token: learn the teacher's most probable class (DeiT's hard distillation) instead of its probabilities."""
    feature_loss: Literal["mse", "cosine"] = "mse"
    """features: mean squared error, as timm's, or one minus the cosine."""
    label_weight: NonNegativeFloat = 0.5
    """Factor of the loss of the labels (DeiT's)."""
    distillation_weight: NonNegativeFloat = 0.5
    """Factor of the distance from the teacher (DeiT's)."""

    @model_validator(mode="after")
    def _fits_the_method(self) -> "DistillationTask":
        if self.hard_targets and self.method != "token":
            raise ValueError(f'hard_targets = true needs method = "token", not "{self.method}"')
        return self

    @property
    def not_estimated(self) -> list[str]:
        return ["teacher"]

    def check(self) -> None:
        from scalevit.training.tasks.distillation.teacher import check_teacher

        check_teacher(self.teacher)

    def build(self, config: "Config", world: "World") -> "DistillationRunner":
        from scalevit.training.tasks.distillation.runner import DistillationRunner
        from scalevit.training.tasks.distillation.teacher import load_teacher

        teacher = load_teacher(self.teacher, config, needs_classes=self.method != "features")
        return DistillationRunner(self, config, world, teacher)
