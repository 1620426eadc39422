"""The config tree: every setting of a run, its type, its default and its meaning, and what must fit across sections.

The defaults are the paper's recipe (arXiv:2512.01059) for ViT-B/16 on ImageNet-1k. The only module of `config` that
knows the Parts of other rooms; nothing here imports torch, so that a mistake is reported before any process group
starts.
"""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, create_model, model_validator

from scalevit.config.base import FilePath, Section, one_of
from scalevit.config.data import DataConfig
from scalevit.config.model import KernelsConfig, ModelConfig
from scalevit.config.training import (
    EmaConfig,
    EvaluationConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from scalevit.engines import ENGINES
from scalevit.models.reductions import REDUCTIONS
from scalevit.runs.trackers import TRACKERS
from scalevit.runs.trackers.base import Tracker
from scalevit.training.losses import LOSSES
from scalevit.training.tasks import TASKS

if TYPE_CHECKING:
    from scalevit.engines.settings import EngineSettings as EngineSection
    from scalevit.models.reductions.base import Reduction as ReductionSection
    from scalevit.training.losses.base import Loss as LossSection
    from scalevit.training.tasks.base import Task as TaskSection
else:
    EngineSection, ReductionSection = one_of(ENGINES), one_of(REDUCTIONS)
    LossSection, TaskSection = one_of(LOSSES), one_of(TASKS)


class TrackingConfig(Section):
    """Where the records of a run are sent besides its run folder: one section per tracker."""

    @property
    def enabled(self) -> list[Tracker]:
        """The trackers that are on."""
        trackers: list[Tracker] = [getattr(self, name) for name in type(self).model_fields]
        return [tracker for tracker in trackers if tracker.enabled]


_TRACKERS: dict[str, Any] = {part.kind(): (part, part()) for part in TRACKERS}
_TrackingSection: type[TrackingConfig] = create_model(
    "TrackingConfig", __base__=TrackingConfig, __doc__=TrackingConfig.__doc__, **_TRACKERS
)
if not TYPE_CHECKING:
    TrackingConfig = _TrackingSection


class Config(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run and of its run folder."""
    output_dir: FilePath = "runs"
    """Folder in which run folders are created."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of all random numbers of the run."""
    model: ModelConfig = ModelConfig()
    reduction: ReductionSection = REDUCTIONS[0]()
    """How the parameters of the MLPs are reduced; `reduction.strategy` selects one."""
    kernels: KernelsConfig = KernelsConfig()
    data: DataConfig = DataConfig()
    task: TaskSection = TASKS[0]()
    """What the model is trained for; `task.name` selects one."""
    loss: LossSection = LOSSES[0]()
    """The training loss; `loss.name` selects one."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    ema: EmaConfig = EmaConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineSection = ENGINES[0]()
    """How the model is sharded over ranks; `engine.name` selects one."""
    tracking: TrackingConfig = TrackingConfig()

    @property
    def peak_lr(self) -> float:
        """The largest learning rate of the run, which its schedule scales."""
        return self.optimizer.peak_lr(self.train.global_batch)

    @property
    def largest_training_image(self) -> int:
        """Side in pixels of the largest images of a training step."""
        return max(self.data.augmentation.image_sizes, default=self.model.image_size)

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        train, schedule = self.train, self.schedule
        if schedule.warmup_epochs >= train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {schedule.warmup_epochs:g}: must be below train.epochs = {train.epochs}"
            )
        if self.model.in_chans not in (1, 3):
            raise ValueError(f"model.in_chans = {self.model.in_chans}: must be 3 (RGB images) or 1 (grey ones)")
        self.engine.check_training(precision=train.precision, meta_init=train.meta_init)
        self.loss.check_classes(self.model.num_classes)
        self.loss.check_views(self.data.augmentation.splits)
        return self


SECTIONS = {key: key for key in Config.model_fields}
"""For `naming_settings` around a room that is handed whole sections, each as the argument of its own name."""
