"""A plan: what each strategy and engine needs on so many devices, and how fast a step can be there."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from torch import nn

from scalevit.config.loading import validate
from scalevit.config.tree import SECTIONS, Config
from scalevit.data.order.batching import BatchLayout
from scalevit.distributed import World
from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.factory import check_engine
from scalevit.engines.fsdp.settings import FsdpSettings
from scalevit.errors import UserError, naming_settings
from scalevit.models.build import build_model
from scalevit.models.reductions import REDUCTIONS
from scalevit.models.reductions.base import Reduction
from scalevit.planning.activations import MODES, Mode, Trace, trace
from scalevit.planning.devices import Device
from scalevit.planning.engines import EngineConfig, Held, Layout, Sent, account, engine_name, not_estimated, overlaps

_STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Row:
    """One strategy under one engine, with the config's micro-batch."""

    strategy: str
    engine: str
    parameters: int
    held: Held
    activation_bytes: float
    """Peak of forward and backward on one rank."""
    sent: Sent
    wire_bytes: float
    """Sent by each rank in a step."""
    seconds: dict[str, float]
    """Of a step, by the resource that they are spent on: compute, memory, link."""
    steps_per_second: float
    bound_by: str
    memory_bytes: float
    fits: bool
    largest_micro_batch: int | None
    """That fits and divides the global batch over the ranks; None where none does."""


@dataclass(frozen=True)
class Plan:
    """All that `scalevit plan` tells."""

    config: Config
    device: Device
    gpus: int
    nodes: int
    accumulation: int
    mode: Mode
    rows: list[Row]
    activations: dict[str, dict[Mode, dict[bool, Trace]]]
    """By strategy, kernel mode and activation checkpointing, for the config's micro-batch."""
    not_estimated: list[str]
    """Settings of the config that the numbers leave out."""
    left_out: dict[str, str]
    """Strategies that this model does not allow, with the reason."""


def make_plan(config: Config, device: Device, *, gpus: int, nodes: int) -> Plan:
    """Estimates every strategy and engine. The config's own strategy and engine keep their settings.

    Args:
        gpus: devices over all nodes, one rank each.

    Raises:
        UserError: the numbers do not fit each other or the config, or the model cannot be built.
    """
    for name, number in (("--gpus", gpus), ("--nodes", nodes)):
        if number < 1:
            raise UserError(f"{name} {number}: must be at least 1")
    if gpus % nodes:
        raise UserError(f"--gpus {gpus}: must be a multiple of --nodes {nodes}, the devices of all nodes together")
    check_engine(config.engine, World(rank=0, size=gpus, local_rank=0, local_size=gpus, device=torch.device("meta")))
    ignored = [*not_estimated(config.engine), *(["train.compile"] if config.train.compile else [])]
    with naming_settings({"global_batch": "train.global_batch"}):
        accumulation = BatchLayout(config.train.global_batch, config.train.micro_batch).accumulation(gpus)
    mode: Mode = "eager" if config.kernels.mlp == "eager" or device.name == "cpu" else config.kernels.save
    rows: list[Row] = []
    activations: dict[str, dict[Mode, dict[bool, Trace]]] = {}
    left_out: dict[str, str] = {}
    for strategy in (part.kind() for part in REDUCTIONS):
        reduction = _reduction(config, strategy)
        try:
            with naming_settings(SECTIONS):
                model = _Model(config, reduction, mode)
        except UserError as error:
            if strategy == config.reduction.strategy:
                raise
            left_out[strategy] = str(error)
            continue
        activations[strategy] = {
            each: {ckpt: model.run(config.train.micro_batch, each, ckpt) for ckpt in (False, True)} for each in MODES
        }
        rows += [_row(config, device, gpus, nodes, accumulation, model, engine) for engine in _engines(config)]
    return Plan(config, device, gpus, nodes, accumulation, mode, rows, activations, ignored, left_out)


class _Model:
    """A reduced model on the meta device, and what its micro-batches cost."""

    def __init__(self, config: Config, reduction: Reduction, mode: Mode):
        model = config.model.model_copy(update={"initial_weights": None})
        network: nn.Module = build_model(model, reduction, seed=0, device="meta")
        self.strategy, self.mode = reduction.strategy, mode
        self.layout = Layout.of(network)
        self.parameters = sum(p.numel() for p in self.layout.parameters)
        self.checkpointing = config.train.activation_checkpointing
        self._run = cache(partial(trace, model, reduction, precision=config.train.precision))

    def run(self, batch: int, mode: Mode | None = None, checkpointing: bool | None = None) -> Trace:
        """One micro-batch, as configured where nothing else is said."""
        return self._run(
            mode=mode or self.mode,
            activation_checkpointing=self.checkpointing if checkpointing is None else checkpointing,
            batch=batch,
        )


def _reduction(config: Config, strategy: str) -> Reduction:
    """The config's own where it is of that kind, else the strategy with the paper's values."""
    if config.reduction.strategy == strategy:
        return config.reduction
    return validate({"reduction": {"strategy": strategy}}).reduction


def _engines(config: Config) -> list[EngineConfig]:
    """ZeRO 0 to 3 and FSDP2, with the config's settings where they belong to that kind."""
    own: EngineConfig = config.engine
    if isinstance(own, FsdpSettings):
        return [*(DeepSpeedSettings(stage=stage) for stage in _STAGES), own]
    overlaps = {stage: own.overlap_comm if stage else None for stage in _STAGES}  # stage 0 has no such setting
    stages = [DeepSpeedSettings(stage=stage, overlap_comm=overlaps[stage], native=own.native) for stage in _STAGES]
    return [*stages, FsdpSettings()]


def _row(
    config: Config, device: Device, gpus: int, nodes: int, accumulation: int, model: _Model, engine: EngineConfig
) -> Row:
    train = config.train
    held, sent = account(engine, model.layout, ranks=gpus, accumulation=accumulation, ema=config.ema.enabled)
    run = model.run(train.micro_batch)
    wire = sent.on_the_wire(gpus)
    seconds = _seconds(config, device, gpus, nodes, accumulation, run, held, sent)
    on_device = seconds["compute"] + seconds["memory"]
    step = max(on_device, seconds["link"]) if overlaps(engine) else on_device + seconds["link"]
    memory = held.peak(run.peak_bytes)
    usable = device.usable_memory * device.memory_bytes
    largest = _largest_micro_batch(config, gpus, model, held, usable)
    return Row(
        strategy=model.strategy,
        engine=engine_name(engine),
        parameters=model.parameters,
        held=held,
        activation_bytes=run.peak_bytes,
        sent=sent,
        wire_bytes=wire,
        seconds=seconds,
        steps_per_second=1 / step,
        bound_by=max(seconds, key=lambda resource: seconds[resource]),
        memory_bytes=memory,
        fits=memory <= usable,
        largest_micro_batch=largest,
    )


def _seconds(
    config: Config,
    device: Device,
    gpus: int,
    nodes: int,
    accumulation: int,
    run: Trace,
    held: Held,
    sent: Sent,
) -> dict[str, float]:
    """A step's time on each resource, were it alone."""
    train = config.train
    flops = device.flops_32bit if train.precision == "fp32" else device.flops_16bit
    # A ring is as fast as its slowest link. Of HSDP's, those of the shards may stay within a node.
    between, within = sent.between_replicas(gpus), sent.within_shards(gpus)
    network = device.link_bandwidth if nodes == 1 else device.network_bandwidth
    inside = nodes == 1 or (sent.shards is not None and (gpus // nodes) % sent.shards == 0)
    link = between / network + within / (device.link_bandwidth if inside else network)
    # The optimizer reads weights, gradients and both moments, and writes all but the gradients; an EMA reads and
    # writes itself and reads the weights.
    updating = 7 * held.updated + 3 * held.ema
    return {
        "compute": accumulation * run.flops / (flops * device.compute_share),
        "memory": (accumulation * run.traffic_bytes + updating) / (device.memory_bandwidth * device.memory_share),
        "link": link / device.link_share,
    }


def _largest_micro_batch(config: Config, gpus: int, model: _Model, held: Held, usable: float) -> int | None:
    """The largest that stays within so many bytes, and that divides the ranks' part of a step.

    Memory grows with the batch, so the candidates are searched by halves.
    """
    per_rank = config.train.global_batch // gpus
    augmentation = config.data.augmentation
    mixes = bool(augmentation.mixup_prob and (augmentation.mixup or augmentation.cutmix))
    candidates = [b for b in range(1, per_rank + 1) if per_rank % b == 0 and not (mixes and b % 2)]
    fitting = bisect_right(candidates, usable, key=lambda batch: held.peak(model.run(batch).peak_bytes))
    return candidates[fitting - 1] if fitting else None
