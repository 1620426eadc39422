"""From a config to a run: the one place that knows all rooms, and hands each its own section or plain values.

Everything that can be wrong is found by `prepare`, before any process group exists, the cheapest to find first.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from scalevit.config.tree import SECTIONS, Config
from scalevit.cpu import prepare_cpu
from scalevit.data.loading.evaluation_loader import EvaluationLoader
from scalevit.data.shards.discovery import class_names, find_shards
from scalevit.distributed import World
from scalevit.engines.base import Engine
from scalevit.engines.precision import matmul_precision
from scalevit.errors import UserError, naming_settings, settings_of
from scalevit.models.build import pretrained_config
from scalevit.models.costs import ModelCosts, model_costs
from scalevit.models.weights.coverage import Coverage
from scalevit.models.weights.read import read_classes
from scalevit.runs.environment import describe_environment
from scalevit.runs.folder import RunFolder
from scalevit.runs.summary import Summary
from scalevit.runs.tracking import Tracking
from scalevit.training.banner import banner
from scalevit.training.engine_builder import EngineBuilder, check_engine
from scalevit.training.evaluation import CheckedMetrics, evaluate_within_limit
from scalevit.training.micro_batch import TRAINING_KNOBS, micro_batch_of_run, naming_out_of_memory
from scalevit.training.open_data import RunData, open_data, open_evaluation
from scalevit.training.resume import check_fingerprint_of_task, find_resumable
from scalevit.training.setting_keys import TRACKER_KEYS, naming_data_settings
from scalevit.training.trainer import Trainer


@dataclass(frozen=True)
class PreparedRun:
    """A run whose config, model, data and folder have been checked; no process group exists yet."""

    config: Config
    world: World
    folder: RunFolder
    tracking: Tracking
    costs: ModelCosts
    """Of the model."""
    checkpoints: list[Path]
    """What it may resume from, the newest first."""
    data: RunData
    build_engine: EngineBuilder

    @property
    def initial_weights(self) -> Coverage | None:
        """What the initial weights gave to the model, where there are any and the run does not resume."""
        return None if self.checkpoints else self.build_engine.initial_weights

    @contextmanager
    def trainer(self) -> Iterator[Trainer]:
        """The trainer of this run, with a process group for as long as the block runs. Collective."""
        with _process_group(self.config, self.world):
            loader = self.data.train
            size = micro_batch_of_run(self.config, self.world, self.build_engine, self.folder)
            loader.split = split = replace(loader.split, micro_batch=size)
            with naming_out_of_memory(split.size, TRAINING_KNOBS):
                engine = self.build_engine(micro_batch=split.size, accumulation=split.accumulation)
                if self.world.is_first:
                    print(self._banner(engine), flush=True)
                yield Trainer(
                    self.config,
                    self.world,
                    engine,
                    self.build_engine.task,
                    self.data,
                    self.folder,
                    self.tracking,
                    self.costs,
                    describe_environment(self.world.size, self.world.device_name),
                    self.initial_weights,
                )

    def _banner(self, engine: Engine) -> str:
        config, folder = self.config, self.folder.path
        task = self.build_engine.task.summary
        return banner(config, self.world, self.data, self.costs, engine.module, folder, self.initial_weights, task)

    def train(self, *, after_evaluation: Callable[[Path], object] | None = None) -> Summary:
        """Trains to the end.

        Args:
            after_evaluation: called on rank 0 with the run folder after each evaluation; must not raise.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was saved.
            UserError: the data, the disk or the numbers end the run.
        """
        with self.trainer() as trainer:
            return trainer.fit(resume_from=self.checkpoints, after_evaluation=after_evaluation)


@dataclass(frozen=True)
class PreparedEvaluation:
    """Weights and validation data that have been checked; no process group exists yet."""

    config: Config
    world: World
    data: EvaluationLoader
    build_engine: EngineBuilder

    def evaluate(self) -> CheckedMetrics:
        """Every metric of the validation set, and its bad samples.

        Raises:
            UserError: a shard cannot be read, there are more bad samples than `data.max_faults`, or memory does not
                suffice.
        """
        images = self.config.evaluation.batch
        with _process_group(self.config, self.world), naming_out_of_memory(images, "lower evaluation.batch"):
            engine = self.build_engine(micro_batch=1, accumulation=1)  # no step is taken
            return evaluate_within_limit(
                engine,
                self.data,
                self.config.task.forms(engine.module),
                channels_last=self.config.train.channels_last,
                max_faults=self.config.data.max_faults,
            )


def prepare(config: Config) -> PreparedRun:
    """Checks everything that a run needs, and opens its data.

    Raises:
        UserError: one line with the config key, the file or the shard that has to be changed.
    """
    world = World.from_environment()
    config = with_model_defaults(config)
    folder = RunFolder(Path(config.output_dir) / config.name, writes=world.is_first)
    scope = check_engine(config, world)
    tracking, costs = _check_settings(config)
    checkpoints = find_resumable(config, folder)
    with naming_data_settings():
        data = open_data(config, world)
    with naming_settings(SECTIONS), settings_of("task"):
        task = config.task.build(config, world)
    check_fingerprint_of_task(checkpoints, task.fingerprint, config, folder)
    build_engine = EngineBuilder(config, world, scope, task)
    return PreparedRun(config, world, folder, tracking, costs, checkpoints, data, build_engine)


def check_settings(config: Config) -> ModelCosts:
    """Checks what can be checked without data and run folder, and counts the model's parameters.

    Raises:
        UserError: one line with the config key.
    """
    config = with_model_defaults(config)
    check_engine(config, World.from_environment())
    return _check_settings(config)[1]


def _check_settings(config: Config) -> tuple[Tracking, ModelCosts]:
    tracking = Tracking(config.tracking.enabled)
    with naming_settings(TRACKER_KEYS):
        tracking.check()
    with naming_settings(SECTIONS), settings_of("task"):
        config.task.check()
    with naming_settings(SECTIONS):
        return tracking, model_costs(config.model, config.reduction)


def prepare_evaluation(
    config: Config, model: nn.Module | None = None, *, classes: Sequence[str] | None = None
) -> PreparedEvaluation:
    """Checks what an evaluation of the config's initial weights needs, and opens the validation data.

    Args:
        model: of the config, evaluated instead; on the CPU, with PyTorch's own modules for its MLPs.
        classes: names of its labels, if they are known.

    Raises:
        UserError: as `prepare`, or no weights are named.
    """
    weights = config.model.weights_source
    if weights is None and model is None:
        raise UserError("config: model.initial_weights = null: name the weights to evaluate")
    world = World.from_environment()
    config = with_model_defaults(config)
    scope = check_engine(config, world)
    build_engine = EngineBuilder(config, world, scope, need_classifier=True, model=model)
    with naming_data_settings():
        if model is None and weights is not None:
            classes = _classes_of_weights(config, weights, world)
        data = open_evaluation(config, world, classes=classes)
    return PreparedEvaluation(config, world, data, build_engine)


def _classes_of_weights(config: Config, weights: str, world: World) -> tuple[str, ...] | None:
    """Names of the labels that the weights were trained with: in their file, or else those of the training set."""
    classes = read_classes(weights)
    if classes is None and config.data.class_map is None:
        try:
            shards = find_shards(config.data.train)
        except UserError:  # there are none on this machine, which an evaluation does not need
            shards = []
        classes = class_names(shards) if shards else None
        if classes is None and class_names(find_shards(config.data.validation)) is not None and world.is_first:
            print(
                f"warning: {weights} names no classes: labels of data.validation are taken as they are numbered there",
                file=sys.stderr,
            )
    return classes


def with_model_defaults(config: Config) -> Config:
    """The config with the timm model's own preparation of images where it is null, so that it is recorded."""
    data = config.data
    with naming_settings(SECTIONS):
        own = pretrained_config(config.model.name)
    filled = data.model_copy(
        update={
            "mean": data.mean or own.mean,
            "std": data.std or own.std,
            "crop_pct": data.crop_pct or own.crop_pct,
            "crop_mode": data.crop_mode or own.crop_mode,
            "interpolation": data.interpolation or own.interpolation,
        }
    )
    return config.model_copy(update={"data": filled})


@contextmanager
def _process_group(config: Config, world: World) -> Iterator[None]:
    if world.device.type == "cpu":
        prepare_cpu(ranks_per_node=world.ranks_per_node, loaders=config.data.workers)
    with (
        matmul_precision(config.train.matmul_precision),
        world.process_group(offloads=config.engine.offloads),
    ):
        yield
