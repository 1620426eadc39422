"""What a config needs of timm, checked without data, weights or devices: for commands that only read configs.

Must not know how a run is opened; a run makes the same checks when it is prepared.
"""

import torch

from scalevit.config.tree import SECTIONS, Config
from scalevit.data.transforms.base import Transform
from scalevit.distributed import World
from scalevit.engines import ENGINES
from scalevit.engines.settings import EngineSettings
from scalevit.errors import naming_settings, settings_of
from scalevit.models.costs import ModelCosts, model_costs
from scalevit.training.engine_builder import check_optimization
from scalevit.training.open_data import evaluation_transform_of, training_transform_of
from scalevit.training.optimizers import optimizer_refusals
from scalevit.training.run import with_model_defaults
from scalevit.training.setting_keys import OPTIMIZATION_KEYS, naming_data_settings


def check_settings(config: Config, *, ranks: int = 1) -> ModelCosts:
    """Finds names and arguments that timm does not take, and an engine that cannot run the optimizer.

    Args:
        ranks: of the run.

    Returns:
        The model's costs, which its shapes give.

    Raises:
        UserError: in one line, with the config key.
    """
    config = with_model_defaults(config)
    check_optimization(config, _world(ranks))
    with naming_settings(SECTIONS), settings_of("task"):
        config.task.check()
    with naming_data_settings():
        _check_transforms(config)
    with naming_settings(SECTIONS):
        return model_costs(config.model, config.reduction)


def engine_that_fits(config: Config, *, ranks: int) -> EngineSettings:
    """The config's engine if it can run the optimizer and clip its gradients, else the first kind of another that can.

    Args:
        ranks: of the run.

    Raises:
        UserError: no engine can run the optimizer.
    """
    with naming_settings(OPTIMIZATION_KEYS):
        refused = optimizer_refusals(config.optimizer)
    others = [engine() for engine in ENGINES]
    kinds = [config.engine, *others, *(kind for engine in others for kind in engine.variants())]
    fitting = (
        kind
        for kind in kinds
        if kind.update_scope(_world(ranks)) not in refused and not kind.clip_refusal(config.optimizer.used_clip_mode)
    )
    return next(fitting, config.engine)


def _world(ranks: int) -> World:
    return World(rank=0, size=ranks, local_rank=0, ranks_per_node=ranks, device=torch.device("meta"))


def _check_transforms(config: Config) -> tuple[Transform, Transform]:
    return training_transform_of(config), evaluation_transform_of(config)
