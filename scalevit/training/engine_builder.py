"""From a config to an engine around its model, and what can be checked of it before any process group exists."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

from torch import Tensor, nn

from scalevit.config.tree import SECTIONS, Config
from scalevit.distributed import World
from scalevit.engines.base import Engine, EngineSpec
from scalevit.engines.settings import UpdateScope
from scalevit.errors import SettingError, naming_settings, settings_of
from scalevit.models.build import build_model
from scalevit.models.dropout import use_row_keys
from scalevit.models.freezing import freeze
from scalevit.models.fused_mlp import fuse_mlps
from scalevit.models.image_sizes import for_image_sizes
from scalevit.models.meta_init import initial_values
from scalevit.models.mlps import transformer_blocks
from scalevit.models.weights.coverage import Coverage
from scalevit.training.layer_decay import freeze_slow_layers
from scalevit.training.optimizers import build_optimizer, check_optimizer, clipping
from scalevit.training.schedules import Schedule
from scalevit.training.setting_keys import DATA_KEYS, OPTIMIZATION_KEYS
from scalevit.training.tasks.base import OWN_PARAMETERS, TaskRunner


def check_engine(config: Config, world: World) -> UpdateScope:
    """Finds what the engine cannot do on this machine, with these ranks or with this optimizer, and schedules that do
    not fit. Needs no process group.

    Returns:
        How much of a parameter the optimizer's update reads.

    Raises:
        UserError: in one line, with the config key.
    """
    with naming_settings({key: f"engine.{key}" for key in type(config.engine).model_fields}):
        config.engine.check(world)
    return check_optimization(config, world)


def check_optimization(config: Config, world: World) -> UpdateScope:
    """As `check_engine`, without what depends on the machine."""
    with naming_settings(OPTIMIZATION_KEYS):
        Schedule.from_config(config)
        if reason := config.engine.clip_refusal(config.optimizer.used_clip_mode):
            raise SettingError("clip_mode", config.optimizer.clip_mode, reason)
        return check_optimizer(config.optimizer, config.engine.update_scope(world))


class EngineBuilder:
    """Builds the config's model at once, while there is no process group yet, and engines around it later."""

    def __init__(
        self,
        config: Config,
        world: World,
        scope: UpdateScope,
        task: TaskRunner | None = None,
        *,
        need_classifier: bool = False,
        model: nn.Module | None = None,
    ):
        """
        Args:
            scope: as `check_engine` returns it.
            task: what the model is trained for; None for an evaluation.
            need_classifier: as for `build_model`.
            model: of the config, for the first engine instead of one that is built; with PyTorch's own MLPs.

        Raises:
            UserError: the model cannot be built.
        """
        self._config, self._world, self._scope = config, world, scope
        self._need_classifier = need_classifier
        self.task = task or TaskRunner()
        self.initial_weights: Coverage | None = None
        """What they gave to the model, where there are any."""
        self._trained_model = config.model
        if task is not None:  # an evaluation has images of one size
            with naming_settings({**SECTIONS, **DATA_KEYS}):
                sizes = config.data.augmentation.image_sizes
                self._trained_model = for_image_sizes(config.model, config.reduction, sizes)
        self._given = model is not None
        self._model: nn.Module | None = self._build_model() if model is None else self._fused(model)

    def __call__(self, *, micro_batch: int, accumulation: int) -> Engine:
        """An engine around a fresh model. Collective.

        Args:
            micro_batch: rows of a forward pass.
            accumulation: micro-batches per rank and step.

        Raises:
            UserError: the engine refuses the optimizer or the model.
        """
        config = self._config
        # Some optimizers scale by their largest learning rate, which they take for the first one.
        optimizer = config.optimizer.model_copy(update={"lr": config.peak_lr, "lr_base_batch": None})
        model, self._model = self._model or self._build_model(), None  # an engine takes its model over
        spec = EngineSpec(
            world=self._world,
            blocks=transformer_blocks(model),
            optimizer=partial(build_optimizer, config=optimizer),
            micro_batch=micro_batch,
            accumulation=accumulation,
            precision=config.train.precision,
            update_scope=self._scope,
            clipping=clipping(config.optimizer, model),
            activation_checkpointing=config.train.activation_checkpointing,
            compile="inductor" if config.train.compile else None,
            compile_mode=config.train.compile_mode,
            forms=len(config.task.forms(model)),
            initial_values=self._initial_values(model) if config.train.meta_init and not self._given else None,
        )
        with naming_settings(OPTIMIZATION_KEYS):
            engine = config.engine.build(model, spec)
        self.task.start(engine.module)
        return engine

    def _initial_values(self, model: nn.Module) -> Callable[[], Iterator[tuple[str, Tensor]]]:
        """Of a model on the meta device, and of the task's own modules, which move there."""
        own = {}
        if (modules := getattr(model, OWN_PARAMETERS.rstrip("."), None)) is not None:
            own = {OWN_PARAMETERS + name: tensor.detach() for name, tensor in modules.named_parameters()}
            modules.to("meta")
        values = partial(initial_values, self._config.model, self._config.reduction, seed=self._config.seed)
        return lambda: chain(values(), own.items())

    def _keep_coverage(self, coverage: Coverage) -> None:
        self.initial_weights = coverage

    def _build_model(self) -> nn.Module:
        config = self._config
        with naming_settings({**SECTIONS, **OPTIMIZATION_KEYS}):
            model = build_model(
                self._trained_model,
                config.reduction,
                seed=config.seed,
                device="meta" if config.train.meta_init else "cpu",
                kernels=config.kernels,
                run_device=self._world.device,
                need_classifier=self._need_classifier,
                on_weights=self._keep_coverage,
            )
        return self._prepared(model)

    def _fused(self, model: nn.Module) -> nn.Module:
        """A given model as `_build_model` builds it."""
        with naming_settings(SECTIONS):
            fuse_mlps(model, self._config.kernels, self._world.device)
        return self._prepared(model)

    def _prepared(self, model: nn.Module) -> nn.Module:
        """A model as the task needs it, with frozen parameters, and masks that follow from keys."""
        config = self._config
        with naming_settings(OPTIMIZATION_KEYS):
            freeze(model, config.optimizer.frozen)
            freeze_slow_layers(model, config.optimizer)
        with naming_settings(SECTIONS), settings_of("task"):
            config.task.adapt(model, config.kernels)
            self.task.extend(model)
        use_row_keys(model)
        if not transformer_blocks(model):
            for key in ("compile", "activation_checkpointing"):
                if getattr(config.train, key):
                    raise SettingError(f"train.{key}", True, f"works on blocks, and {config.model.name} has none")
        return model
