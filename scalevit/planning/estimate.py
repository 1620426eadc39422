"""What each reduction and engine needs on a number of devices, and how fast a step can be there.

Knows the config, models on shapes, the engines' `cost` and numbers of a device; must not know process groups or
training, and names no reduction and no engine.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from scalevit.config.tree import SECTIONS, Config
from scalevit.data.order.batching import Split
from scalevit.distributed import World
from scalevit.engines import ENGINES
from scalevit.engines.cost import EngineCost, ParameterLayout, Workload
from scalevit.engines.precision import weight_dtype
from scalevit.engines.settings import EngineSettings, UpdateScope
from scalevit.errors import SettingError, UserError, naming_settings
from scalevit.models.build import build_model
from scalevit.models.freezing import freeze
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions import REDUCTIONS
from scalevit.models.reductions.base import Reduction
from scalevit.planning.activations import MODES, Mode, Trace, TracedModel
from scalevit.planning.devices import Device


@dataclass(frozen=True)
class EstimateRow:
    """One reduction with one engine."""

    strategy: str
    engine: str
    parameters: int
    micro_batch: int
    """Images of a forward pass: as configured, or the largest that fits where the config leaves it open."""
    accumulation: int
    """Micro-batches per rank and step."""
    padding: float
    """Rows of weight 0 that fill up uneven ranks and micro-batches, as a fraction of the global batch."""
    cost: EngineCost
    activation_bytes: float
    """Peak of forward and backward on one rank."""
    bytes_sent: float
    """By each rank in a step."""
    seconds: dict[str, float]
    """Of a step, by the resource that is in use: compute, memory, link."""
    steps_per_second: float
    bound_by: str
    memory_bytes: float
    """Upper bound on one rank."""
    fits: bool
    largest_micro_batch: int | None
    """That fits; None if not even one image does."""


@dataclass(frozen=True)
class Activations:
    """Of one micro-batch."""

    saved_bytes: float
    """Kept by the forward for the backward."""
    peak_bytes: float
    """The most that is allocated at any time."""


@dataclass(frozen=True)
class RunEstimate:
    """What `scalevit plan` reports."""

    config: Config
    device: Device
    gpus: int
    nodes: int
    mode: Mode
    """How MLPs are computed in `rows`."""
    rows: list[EstimateRow]
    activations: dict[tuple[Mode, bool], Activations]
    """Of the config's own strategy and `activations_of` images, by kernel mode and activation checkpointing: every mode
    without it, and `mode` with it. Empty where only the own row was asked for."""
    activations_of: int
    """The micro-batch of the config's own row."""
    not_estimated: list[str]
    """Settings of the config whose effect the numbers leave out."""
    left_out: dict[str, str]
    """Strategies that this model does not allow, with the reason."""
    engines_left_out: dict[str, str]
    """Labels of the engines that cannot run the config's optimizer on these devices, with the reason."""


def estimate_run(
    config: Config,
    device: Device,
    *,
    gpus: int,
    nodes: int,
    optimizer_tensors: int,
    optimizer_refusals: Mapping[UpdateScope, str],
    compare: bool = True,
    report: Callable[[str], None] = lambda text: None,
) -> RunEstimate:
    """Estimates every reduction with every engine. The config's own settings are used wherever they apply.

    Args:
        compare: False leaves out all reductions and engines but the config's own.
        gpus: devices over all nodes, one rank each.
        optimizer_tensors: state tensors of the parameter's shape that the config's optimizer has, e.g. 2 for AdamW.
        optimizer_refusals: why an engine with this `update_scope` cannot run that optimizer; absent where it can.
        report: called with what is estimated next; the whole takes seconds.

    Raises:
        SettingError: `gpus` or `nodes` is not usable, or the config's own engine cannot run its "optimizer" or
            "clip_mode".
        UserError: there are more ranks than images, the ranks do not suit the engine, or the config's model cannot be
            built.
    """
    world = _world(gpus, nodes)
    _check(config, world, optimizer_refusals)
    engines = list(_engines(config)) if compare else [config.engine]
    refusals = {engine.label: _refusal(config, engine, world, optimizer_refusals) for engine in engines}
    engines_left_out = {label: reason for label, reason in refusals.items() if reason is not None}
    usable = device.usable_memory * device.memory_bytes
    run = _Run(config, device, gpus, nodes, optimizer_tensors, usable)
    mode: Mode = "eager" if config.kernels.mlp == "eager" or device.name == "cpu" else config.kernels.save
    rows: list[EstimateRow] = []
    models: dict[str, _ReducedModel] = {}
    left_out: dict[str, str] = {}
    for reduction in _reductions(config) if compare else [config.reduction]:
        strategy = reduction.kind()
        report(strategy)
        try:
            with naming_settings(SECTIONS):
                model = _ReducedModel(config, reduction, mode)
        except UserError as error:
            if reduction is config.reduction:
                raise
            left_out[strategy] = str(error)
            continue
        models[strategy] = model
        rows += [run.row(model, engine) for engine in engines if engine.label not in engines_left_out]
    shown = run.micro_batch(models[config.reduction.kind()], config.engine)
    kinds = [*((each, False) for each in MODES), (mode, True)] if compare else []
    activations = {kind: _activations(config, *kind, shown, report) for kind in kinds}
    return RunEstimate(
        config, device, gpus, nodes, mode, rows, activations, shown, _ignored(config), left_out, engines_left_out
    )


def _ignored(config: Config) -> list[str]:
    ignored = [f"engine.{name}" for name in config.engine.not_estimated]
    ignored += [f"task.{name}" for name in config.task.not_estimated]
    if config.data.augmentation.splits:
        ignored.append("data.augmentation.splits")
    if config.data.augmentation.image_sizes:
        ignored.append("the smaller data.augmentation.image_sizes")
    if config.optimizer.frozen:
        ignored.append("optimizer.frozen in activations and time")
    if config.optimizer.layer_decay_no_opt_scale is not None:
        ignored.append("optimizer.layer_decay_no_opt_scale")
    if config.train.compile:
        ignored.append("train.compile")
    return ignored


def largest_micro_batch(config: Config, *, ranks: int, memory_bytes: float, optimizer_tensors: int) -> int:
    """The largest micro-batch of the config's own model and engine that is estimated to fit; 1 if none is.

    Args:
        ranks: of the run.
        memory_bytes: of one rank, that can be used.
        optimizer_tensors: as for `estimate_run`.
    """
    mode: Mode = "eager" if config.kernels.mlp == "eager" else config.kernels.save
    run = _Run(config, None, ranks, 1, optimizer_tensors, memory_bytes)
    return run.largest_micro_batch(_ReducedModel(config, config.reduction, mode), config.engine) or 1


def _world(gpus: int, nodes: int) -> World:
    """The ranks of the planned run, for what engines say of them.

    Raises:
        SettingError: `gpus` or `nodes` is not usable.
    """
    for argument, number in (("gpus", gpus), ("nodes", nodes)):
        if number < 1:
            raise SettingError(argument, number, "must be at least 1")
    if gpus % nodes:
        raise SettingError("gpus", gpus, f"counts the devices of all nodes: must be a multiple of nodes = {nodes}")
    return World(rank=0, size=gpus, local_rank=0, ranks_per_node=gpus, device=torch.device("meta"))


def _check(config: Config, world: World, optimizer_refusals: Mapping[UpdateScope, str]) -> None:
    """Finds what the config's own engine cannot run on these ranks.

    Raises:
        UserError: as `estimate_run`.
    """
    with naming_settings({key: f"engine.{key}" for key in type(config.engine).model_fields}):
        config.engine.check(world)
    if reason := optimizer_refusals.get(config.engine.update_scope(world)):
        raise SettingError("optimizer", config.optimizer.name, reason)
    if reason := config.engine.clip_refusal(config.optimizer.used_clip_mode):
        raise SettingError("clip_mode", config.optimizer.clip_mode, reason)
    with naming_settings({"global_batch": "train.global_batch"}):
        Split(config.train.global_batch, world.size, 1)


def _refusal(
    config: Config, engine: EngineSettings, world: World, optimizer_refusals: Mapping[UpdateScope, str]
) -> str | None:
    """Why an engine cannot step the config's optimizer, or train in its precision, or None if it can."""
    try:
        engine.check_training(precision=config.train.precision, meta_init=False)
    except ValueError as error:
        return str(error)
    reason = optimizer_refusals.get(engine.update_scope(world))
    if reason is None and (clipping := engine.clip_refusal(config.optimizer.used_clip_mode)):
        return f"optimizer.clip_mode = {config.optimizer.clip_mode} {clipping}"
    return reason


def _reductions(config: Config) -> Iterator[Reduction]:
    """One of every kind: the config's own, and the others with their defaults, the paper's values."""
    for part in REDUCTIONS:
        yield config.reduction if isinstance(config.reduction, part) else part()


def _engines(config: Config) -> Iterator[EngineSettings]:
    """Every kind of sharding of every engine, with the config's own settings for its engine."""
    for part in ENGINES:
        own = config.engine if isinstance(config.engine, part) else part()
        yield from own.variants()


class _ReducedModel:
    """A reduced model on the meta device, and what its micro-batches cost."""

    def __init__(self, config: Config, reduction: Reduction, mode: Mode):
        """
        Raises:
            UserError: as `build_model`.
        """
        model = config.model.without_weights()
        network = freeze(build_model(model, reduction, seed=0, device="meta"), config.optimizer.frozen)
        self.strategy = reduction.kind()
        self.layout = ParameterLayout.of(network, transformer_blocks(network))
        self.parameters = sum(parameter.numel() for parameter in self.layout.parameters)
        self._traced = _traced(config, reduction, mode, config.train.activation_checkpointing)

    def costs(self, images: int) -> Trace:
        """Of one micro-batch."""
        return self._traced.costs(images)


def _traced(config: Config, reduction: Reduction, mode: Mode, checkpointing: bool) -> TracedModel:
    precision = config.train.precision
    model = config.model.model_copy(update={"image_size": config.largest_training_image})
    return TracedModel(model, reduction, mode=mode, precision=precision, activation_checkpointing=checkpointing)


def _activations(
    config: Config, mode: Mode, checkpointing: bool, images: int, report: Callable[[str], None]
) -> Activations:
    report(f"activations, MLP {mode}")
    traced = _traced(config, config.reduction, mode, checkpointing)
    return Activations(traced.saved_bytes(images), traced.trace(images).peak_bytes)


@dataclass(frozen=True)
class _Run:
    """What all rows have in common; the fields are the arguments of `estimate_run`."""

    config: Config
    device: Device | None
    gpus: int
    nodes: int
    optimizer_tensors: int
    usable_bytes: float
    """Of a rank's memory."""

    def row(self, model: _ReducedModel, engine: EngineSettings) -> EstimateRow:
        split = self._split(self.micro_batch(model, engine))
        cost = self._cost(model, engine, split)
        micro_batch = model.costs(split.size)
        seconds = self._seconds(micro_batch, cost, split.accumulation)
        on_device = seconds["compute"] + seconds["memory"]
        step = max(on_device, seconds["link"]) if engine.overlaps_communication else on_device + seconds["link"]
        memory = cost.memory.peak(micro_batch.peak_bytes)
        return EstimateRow(
            strategy=model.strategy,
            engine=engine.label,
            parameters=model.parameters,
            micro_batch=split.size,
            accumulation=split.accumulation,
            padding=split.padding_share,
            cost=cost,
            activation_bytes=micro_batch.peak_bytes,
            bytes_sent=cost.traffic.bytes_sent(self.gpus),
            seconds=seconds,
            steps_per_second=1 / step,
            bound_by=max(seconds, key=lambda resource: seconds[resource]),
            memory_bytes=memory,
            fits=memory <= self.usable_bytes,
            largest_micro_batch=self.largest_micro_batch(model, engine),
        )

    def micro_batch(self, model: _ReducedModel, engine: EngineSettings) -> int:
        """Rows of a forward pass: as configured, or the largest that fits (1 if none does)."""
        configured = self.config.train.micro_batch
        return self._split((self.largest_micro_batch(model, engine) or 1) if configured == "auto" else configured).size

    def _split(self, micro_batch: int) -> Split:
        return Split(self.config.train.global_batch, self.gpus, micro_batch)

    def _cost(self, model: _ReducedModel, engine: EngineSettings, split: Split) -> EngineCost:
        workload = Workload(
            self.gpus,
            split.accumulation,
            self.optimizer_tensors,
            ema=self.config.ema.enabled,
            weight_bytes=weight_dtype(self.config.train.precision).itemsize,
        )
        return engine.cost(model.layout, workload)

    def largest_micro_batch(self, model: _ReducedModel, engine: EngineSettings) -> int | None:
        """The largest that fits, of those that fill a rank's part of a step with as little padding as possible."""
        whole = self._split(self.config.train.global_batch).size
        if self._bytes(model, engine, whole) <= self.usable_bytes:
            return whole
        # From two micro-batches on, memory grows with their size.
        sizes = sorted({1, *(2 * -(-whole // (2 * count)) for count in range(2, whole // 2 + 1))})
        fitting = bisect_right(sizes, self.usable_bytes, key=lambda size: self._bytes(model, engine, size))
        return sizes[fitting - 1] if fitting else None

    def _bytes(self, model: _ReducedModel, engine: EngineSettings, micro_batch: int) -> float:
        split = self._split(micro_batch)
        return self._cost(model, engine, split).memory.peak(model.costs(split.size).peak_bytes)

    def _seconds(self, micro_batch: Trace, cost: EngineCost, accumulation: int) -> dict[str, float]:
        """A step's time on each resource if no other limited it."""
        device, traffic = self.device, cost.traffic
        assert device is not None, "of a plan, not of a run"
        flops = device.flops_32bit if self.config.train.precision == "fp32" else device.flops_16bit
        # A ring is as fast as its slowest link. Within HSDP, the shards' collectives may stay in a node.
        shards_in_node = traffic.shards is not None and (self.gpus // self.nodes) % traffic.shards == 0
        between_nodes = device.link_bandwidth if self.nodes == 1 else device.network_bandwidth
        between_shards = device.link_bandwidth if self.nodes == 1 or shards_in_node else device.network_bandwidth
        link = traffic.replica_bytes(self.gpus) / between_nodes + traffic.shard_bytes(self.gpus) / between_shards
        # The optimizer reads weights, gradients and its state, and writes weights and state; an EMA reads the weights,
        # and reads and writes itself.
        update_bytes = (3 + 2 * self.optimizer_tensors) * cost.updated_bytes + 3 * cost.memory.ema
        memory_bytes = accumulation * micro_batch.traffic_bytes + update_bytes
        return {
            "compute": accumulation * micro_batch.flops / (flops * device.compute_share),
            "memory": memory_bytes / (device.memory_bandwidth * device.memory_share),
            "link": link / device.link_share,
        }
