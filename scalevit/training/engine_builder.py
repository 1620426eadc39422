"""From a config to an engine around its model, and what can be checked of it before any process group exists."""

from functools import partial

from torch import nn

from scalevit.config.tree import SECTIONS, Config
from scalevit.distributed import World
from scalevit.engines.base import Engine, EngineSpec
from scalevit.engines.settings import UpdateScope
from scalevit.errors import SettingError, naming_settings
from scalevit.models.build import build_model
from scalevit.models.dropout import use_row_keys
from scalevit.models.freezing import freeze
from scalevit.models.meta_init import initial_values
from scalevit.models.mlps import transformer_blocks
from scalevit.models.weights.match import Coverage
from scalevit.training.optimizers import build_optimizer, check_optimizer
from scalevit.training.schedules import Schedule
from scalevit.training.setting_keys import OPTIMIZATION_KEYS


def check_engine(config: Config, world: World) -> UpdateScope:
    """Finds what the engine cannot do on this machine, with these ranks or with this optimizer, and schedules that do
    not fit. Needs no process group.

    Returns:
        How much of a parameter the optimizer's update reads.

    Raises:
        UserError: in one line, with the config key.
    """
    engine_keys = {key: f"engine.{key}" for key in type(config.engine).model_fields}
    with naming_settings({**engine_keys, **OPTIMIZATION_KEYS}):
        config.engine.check(world)
        Schedule(config.schedule, config.optimizer.lr, config.train.epochs)
        return check_optimizer(config.optimizer, config.engine.update_scope(world))


class EngineBuilder:
    """Builds the config's model at once, while there is no process group yet, and engines around it later."""

    def __init__(self, config: Config, world: World, scope: UpdateScope, *, need_classifier: bool = False):
        """
        Args:
            scope: as `check_engine` returns it.
            need_classifier: as for `build_model`.

        Raises:
            UserError: the model cannot be built.
        """
        self._config, self._world, self._scope = config, world, scope
        self._need_classifier = need_classifier
        self.initial_weights: Coverage | None = None
        """What they gave to the model, where there are any."""
        self._model: nn.Module | None = self._build_model()

    def __call__(self, *, micro_batch: int, accumulation: int) -> Engine:
        """An engine around a fresh model. Collective.

        Args:
            micro_batch: rows of a forward pass.
            accumulation: micro-batches per rank and step.

        Raises:
            UserError: the engine refuses the optimizer or the model.
        """
        config = self._config
        model, self._model = self._model or self._build_model(), None  # an engine takes its model over
        spec = EngineSpec(
            world=self._world,
            blocks=transformer_blocks(model),
            optimizer=partial(build_optimizer, config=config.optimizer),
            micro_batch=micro_batch,
            accumulation=accumulation,
            precision=config.train.precision,
            update_scope=self._scope,
            clip_grad_norm=config.optimizer.clip_grad_norm,
            activation_checkpointing=config.train.activation_checkpointing,
            compile="inductor" if config.train.compile else None,
            initial_values=partial(initial_values, config.model, config.reduction, seed=config.seed)
            if config.train.meta_init
            else None,
        )
        with naming_settings(OPTIMIZATION_KEYS):
            return config.engine.build(model, spec)

    def _keep_coverage(self, coverage: Coverage) -> None:
        self.initial_weights = coverage

    def _build_model(self) -> nn.Module:
        config = self._config
        with naming_settings({**SECTIONS, **OPTIMIZATION_KEYS}):
            model = build_model(
                config.model,
                config.reduction,
                seed=config.seed,
                device="meta" if config.train.meta_init else "cpu",
                kernels=config.kernels,
                run_device=self._world.device,
                need_classifier=self._need_classifier,
                on_weights=self._keep_coverage,
            )
            freeze(model, config.optimizer.frozen)
        use_row_keys(model)
        if not transformer_blocks(model):
            for key in ("compile", "activation_checkpointing"):
                if getattr(config.train, key):
                    raise SettingError(f"train.{key}", True, f"works on blocks, and {config.model.name} has none")
        return model
