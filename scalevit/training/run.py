"""From a config to a run: the one place that knows all rooms, and hands each its own section or plain values.

Everything that can be wrong is found by `prepare`, before any process group exists, the cheapest to find first.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import nn

from scalevit.config.tree import SECTIONS, Config
from scalevit.cpu import prepare_cpu
from scalevit.data.loading.evaluation_loader import EvaluationLoader
from scalevit.data.order.batching import BatchLayout
from scalevit.distributed import World
from scalevit.engines.base import Engine, EngineSpec
from scalevit.engines.settings import UpdateScope
from scalevit.errors import UserError, naming_settings, settings_of
from scalevit.models.build import build_model
from scalevit.models.costs import ModelCosts, model_costs
from scalevit.models.meta_init import initial_values
from scalevit.models.mlps import transformer_blocks
from scalevit.runs.environment import describe_environment
from scalevit.runs.folder import RunFolder
from scalevit.runs.summary import Summary
from scalevit.runs.tracking import Tracking
from scalevit.training.evaluation import CheckedMetrics, evaluate_within_limit
from scalevit.training.open_data import RunData, open_data, open_evaluation
from scalevit.training.optimizers import build_optimizer, check_optimizer
from scalevit.training.resume import find_resumable
from scalevit.training.schedules import Schedule
from scalevit.training.setting_keys import OPTIMIZATION_KEYS, TRACKER_KEYS, naming_data_settings
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
    build_engine: Callable[[], Engine]
    """To be called once, inside the process group."""

    @contextmanager
    def trainer(self) -> Iterator[Trainer]:
        """The trainer of this run, with a process group for as long as the block runs. Collective."""
        with _process_group(self.config, self.world):
            with naming_settings(OPTIMIZATION_KEYS):
                engine = self.build_engine()
            yield Trainer(
                self.config,
                self.world,
                engine,
                self.data,
                self.folder,
                self.tracking,
                self.costs,
                describe_environment(self.world.size, self.world.device_name),
            )

    def train(self) -> Summary:
        """Trains to the end.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was saved.
            UserError: the data, the disk or the numbers end the run.
        """
        with self.trainer() as trainer:
            return trainer.fit(resume_from=self.checkpoints)


@dataclass(frozen=True)
class PreparedEvaluation:
    """Weights and validation data that have been checked; no process group exists yet."""

    config: Config
    world: World
    data: EvaluationLoader
    build_engine: Callable[[], Engine]

    def evaluate(self) -> CheckedMetrics:
        """Every metric of the validation set, and its bad samples.

        Raises:
            UserError: a shard cannot be read, or there are more bad samples than `data.max_faults`.
        """
        with _process_group(self.config, self.world):
            with naming_settings(OPTIMIZATION_KEYS):
                engine = self.build_engine()
            return evaluate_within_limit(
                engine,
                self.data,
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
    tracking = Tracking(config.tracking.enabled)
    with naming_settings(TRACKER_KEYS):
        tracking.check()
    with naming_settings(SECTIONS), settings_of("task"):
        config.task.check()
    with naming_settings(SECTIONS):
        costs = model_costs(config.model, config.reduction)
    checkpoints = find_resumable(config, folder)
    with naming_data_settings():
        data = open_data(config, world)
    build_engine = prepare_engine(config, world, scope)
    return PreparedRun(config, world, folder, tracking, costs, checkpoints, data, build_engine)


def prepare_evaluation(config: Config) -> PreparedEvaluation:
    """Checks what an evaluation of `model.initial_weights` needs, and opens the validation data.

    Raises:
        UserError: as `prepare`, or no weights are named.
    """
    if config.model.initial_weights is None:
        raise UserError("config: model.initial_weights = null: name the weights to evaluate")
    world = World.from_environment()
    config = with_model_defaults(config)
    scope = check_engine(config, world)
    with naming_data_settings():
        data = open_evaluation(config, world)
    return PreparedEvaluation(config, world, data, prepare_engine(config, world, scope))


def with_model_defaults(config: Config) -> Config:
    """The config with the timm model's own normalisation where it is null, so that it is recorded with the run."""
    data = config.data
    own: Any = timm.get_pretrained_cfg(config.model.name, allow_unregistered=True) or timm.models.PretrainedCfg()
    filled = data.model_copy(
        update={
            "mean": data.mean or own.mean,
            "std": data.std or own.std,
            "crop_pct": data.crop_pct or own.crop_pct,
        }
    )
    return config.model_copy(update={"data": filled})


def check_engine(config: Config, world: World) -> UpdateScope:
    """Finds what the engine cannot do on this machine, with these ranks or with this optimizer, and schedules that do
    not fit. Needs no process group.

    Returns:
        How much of a parameter the optimizer's update reads, for `prepare_engine`.

    Raises:
        UserError: in one line, with the config key.
    """
    engine_keys = {key: f"engine.{key}" for key in type(config.engine).model_fields}
    with naming_settings({**engine_keys, **OPTIMIZATION_KEYS}):
        config.engine.check(world)
        Schedule(config.schedule, config.optimizer.lr, config.train.epochs)
        return check_optimizer(config.optimizer, config.engine.update_scope(world))


def prepare_engine(config: Config, world: World, scope: UpdateScope) -> Callable[[], Engine]:
    """Builds the config's model, and returns what shards it: to be called once, inside the process group.

    Args:
        scope: as `check_engine` returns it.

    Raises:
        UserError: the model or its batches cannot be built, while there is no process group yet.
    """
    device = "meta" if config.train.meta_init else "cpu"
    with naming_settings(SECTIONS):
        model = build_model(
            config.model,
            config.reduction,
            seed=config.seed,
            device=device,
            kernels=config.kernels,
            run_device=world.device,
        )
    with naming_data_settings():
        spec = _engine_spec(config, world, scope, model)
    return partial(config.engine.build, model, spec)


def _process_group(config: Config, world: World) -> AbstractContextManager[None]:
    if world.device.type == "cpu":
        prepare_cpu(ranks_per_node=world.ranks_per_node, loaders=config.data.workers)
    return world.process_group(offloads=config.engine.offloads)


def _engine_spec(config: Config, world: World, scope: UpdateScope, model: nn.Module) -> EngineSpec:
    """What an engine is built from, besides the model and its own section of the config."""
    return EngineSpec(
        world=world,
        blocks=transformer_blocks(model),
        optimizer=partial(build_optimizer, config=config.optimizer),
        micro_batch=config.train.micro_batch,
        accumulation=BatchLayout(config.train.global_batch, config.train.micro_batch).accumulation(world.size),
        precision=config.train.precision,
        update_scope=scope,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        activation_checkpointing=config.train.activation_checkpointing,
        compile="inductor" if config.train.compile else None,
        initial_values=partial(initial_values, config.model, config.reduction, seed=config.seed)
        if config.train.meta_init
        else None,
    )
