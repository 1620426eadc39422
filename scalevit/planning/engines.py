"""What each engine holds on a rank and sends in a step, as DeepSpeed 0.19 and FSDP2 do it around an fp32 model.

`tests/planning` counts both on real ranks: storages, and the calls of the process group.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.fsdp.settings import FsdpSettings
from scalevit.models.mlps import transformer_blocks
from scalevit.tying import group_by_shared_parameters

EngineConfig = Any
_FP32 = 4


@dataclass(frozen=True)
class Held:
    """Bytes on one rank while it trains."""

    weights: int
    """The module's own, whole or sharded."""
    optimizer: int
    """AdamW's moments, and the fp32 copy of the weights that ZeRO 1 to 3 update."""
    gradients: int
    """Averaged ones, which the optimizer reads; they replace the activations as the backward goes."""
    ema: int
    backward_buffers: int
    """At most beside the activations: gathered parameters, gradients that are not yet averaged, buckets."""
    step_buffers: int
    """At most between backward and optimizer step, when the activations are gone."""
    updated: int
    """Of the fp32 weights, what this rank's optimizer updates; no memory of its own."""

    def peak(self, activations: float) -> float:
        """The most at any time, with so many bytes of activations."""
        state = self.weights + self.optimizer + self.ema
        return state + max(activations + self.backward_buffers, self.gradients + self.step_buffers)


@dataclass(frozen=True)
class Sent:
    """Payload bytes of one optimizer step's collectives, as one rank hands them in (full size, not its share)."""

    all_reduce: int = 0
    reduce_scatter: int = 0
    all_gather: int = 0
    shards: int | None = None
    """Ranks among which the last two go, the first between such groups (HSDP); None for all ranks alike."""

    @property
    def gradients(self) -> int:
        return self.all_reduce + self.reduce_scatter

    def on_the_wire(self, ranks: int) -> float:
        """Bytes that each rank sends with ring algorithms (Patarasuk and Yuan 2009)."""
        return self.between_replicas(ranks) + self.within_shards(ranks)

    def between_replicas(self, ranks: int) -> float:
        """The part of the all-reduces."""
        return _ring(ranks if self.shards is None else ranks // self.shards) * 2 * self.all_reduce

    def within_shards(self, ranks: int) -> float:
        """The part of the reduce-scatters and all-gathers."""
        return _ring(self.shards or ranks) * (self.reduce_scatter + self.all_gather)


def _ring(ranks: int) -> float:
    """The share of a buffer that each of them sends in a reduce-scatter or an all-gather."""
    return (ranks - 1) / ranks


@dataclass(frozen=True)
class Layout:
    """The parameters as engines see them."""

    root: list[nn.Parameter]
    """Of no block."""
    units: list[list[nn.Parameter]]
    """Of blocks that share some, together; of any other block alone."""
    used_again: list[nn.Parameter]
    """Those that blocks share, once for each block after the first."""

    @classmethod
    def of(cls, model: nn.Module) -> "Layout":
        blocks = transformer_blocks(model)
        units = [
            list(dict.fromkeys(p for block in together for p in block.parameters()))
            for together in group_by_shared_parameters(blocks)
        ]
        met: set[nn.Parameter] = set()
        used_again = []
        for block in blocks:
            own = list(block.parameters())
            used_again += [p for p in own if p in met]
            met.update(own)
        return cls([p for p in model.parameters() if p not in met], units, used_again)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for unit in [self.root, *self.units] for p in unit]


def engine_name(engine: EngineConfig) -> str:
    """As tables print it."""
    if isinstance(engine, DeepSpeedSettings):
        return f"ZeRO {engine.stage}"
    return "FSDP2" if engine.shard_size is None else f"HSDP, {engine.shard_size} shards"


def overlaps(engine: EngineConfig) -> bool:
    """Whether communication runs beside computation."""
    if isinstance(engine, FsdpSettings):
        return True
    return engine.stage == 3 if engine.overlap_comm is None else engine.overlap_comm


def not_estimated(engine: EngineConfig) -> list[str]:
    """Settings whose effect is left out: the numbers are those without them."""
    keys = ("offload_optimizer", "offload_parameters", "cpu_offload", "prefetch")
    ignored = [f"engine.{key}" for key in keys if getattr(engine, key, None)]
    if isinstance(engine, FsdpSettings) and engine.mixed_precision == "policy":
        ignored.append("engine.mixed_precision")
    return ignored


def account(engine: EngineConfig, layout: Layout, *, ranks: int, accumulation: int, ema: bool) -> tuple[Held, Sent]:
    """One rank's bytes and one step's traffic.

    Args:
        accumulation: micro-batches per rank and step.
    """
    if isinstance(engine, FsdpSettings):
        return _fsdp(engine, layout, ranks, accumulation, ema)
    return (_zero3 if engine.stage == 3 else _zero012)(engine, layout, ranks, accumulation, ema)


def _zero(engine: DeepSpeedSettings, key: str, default: float) -> float:
    """A native setting, under either of its names."""
    zero = engine.native.get("zero_optimization", {})
    return zero.get(f"stage3_{key}", zero.get(key, default))


def _zero012(engine: DeepSpeedSettings, layout: Layout, ranks: int, accumulation: int, ema: bool) -> tuple[Held, Sent]:
    full = _bytes(layout.parameters)
    averages = full if ema else 0
    accumulates = accumulation > 1
    if engine.stage == 0:
        # All gradients are flattened into one copy, and copied back from it.
        backward = full * (2 if accumulates else 1)
        held = Held(full, 2 * full, full, averages, backward, step_buffers=2 * full, updated=full)
        return held, Sent(all_reduce=full)
    part = full // ranks
    # A bucket has its full size, however small the model.
    buckets = _FP32 * int(_zero(engine, "reduce_bucket_size", 5e8)) * (2 if overlaps(engine) else 1)
    if engine.stage == 1:  # whole gradients wait for the last micro-batch
        backward, step = buckets + full * (2 if accumulates else 1), buckets + 3 * full - part
    else:
        backward, step = buckets + full + (part if accumulates else 0), 0
    held = Held(full, 3 * part, part, averages, backward, step, updated=part)
    # Both stages reduce by all-reduce (`use_multi_rank_bucket_allreduce`), stage 2 after every micro-batch.
    reductions = accumulation if engine.stage == 2 else 1
    return held, Sent(all_reduce=reductions * full, all_gather=full)


def _zero3(engine: DeepSpeedSettings, layout: Layout, ranks: int, accumulation: int, ema: bool) -> tuple[Held, Sent]:
    parameters = layout.parameters
    full, part = _bytes(parameters), sum(_FP32 * -(-p.numel() // ranks) for p in parameters)
    threshold = _zero(engine, "param_persistence_threshold", 1e5)
    persistent = _bytes(p for p in parameters if p.numel() <= threshold)
    count = full // _FP32
    # Parameters stay gathered from forward to backward where both limits allow it; a model has to exceed 5e8
    # parameters, or lower them, to be gathered twice.
    stays = 2 * count <= _zero(engine, "max_reuse_distance", 1e9) and count <= _zero(engine, "max_live_parameters", 1e9)
    bucket = _FP32 * int(_zero(engine, "reduce_bucket_size", 5e8))
    largest = max(_bytes(unit) for unit in [layout.root, *layout.units])
    elsewhere = full - persistent if ranks > 1 else 0  # what has to be gathered
    gathered = elsewhere if stays else min(elsewhere, 2 * largest)
    held = Held(
        weights=part + (persistent if ranks > 1 else 0),
        optimizer=3 * part,
        gradients=part,
        ema=part if ema else 0,
        # Whole gradients wait until they fill a bucket, and are then flattened beside themselves.
        backward_buffers=part + bucket + gathered + min(full, bucket),
        step_buffers=bucket + gathered + 2 * min(full, bucket),
        updated=part,
    )
    once = full - persistent
    if not stays:  # in the forward and in the backward, a shared MLP for each of its uses
        once += _bytes(p for p in layout.used_again if p.numel() > threshold)
        once *= 2
    return held, Sent(reduce_scatter=accumulation * full, all_gather=accumulation * once + persistent)


def _fsdp(engine: FsdpSettings, layout: Layout, ranks: int, accumulation: int, ema: bool) -> tuple[Held, Sent]:
    shards = engine.shard_size or ranks

    def padded(parameters: Iterable[nn.Parameter]) -> int:
        """Rows are dealt out in equal chunks, the last ones filled up."""
        return sum(_FP32 * shards * -(-p.shape[0] // shards) * (p.numel() // p.shape[0]) for p in parameters)

    full = padded(layout.parameters)
    units, root = sum(padded(unit) for unit in layout.units), padded(layout.root)
    part = full // shards
    largest = max(padded(unit) for unit in layout.units)
    # The root stays gathered from forward to backward, and the units if told so; of the others the present one and the
    # next are. A flat copy stands beside a unit while it is gathered or reduced.
    gathered = root + (min(units, 2 * largest) if engine.reshard_after_forward else units)
    held = Held(
        weights=part,
        optimizer=2 * part,
        gradients=part,
        ema=part if ema else 0,
        # Gradients stay whole until the last micro-batch.
        backward_buffers=gathered + max(root, largest) + (full if accumulation > 1 else 0),
        step_buffers=0,
        updated=part,
    )
    # Without it the units stay gathered until the last micro-batch's backward.
    gathers = accumulation * (full + units) if engine.reshard_after_forward else full
    sent = Sent(all_reduce=part if shards < ranks else 0, reduce_scatter=full, all_gather=gathers, shards=shards)
    return held, sent


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(_FP32 * p.numel() for p in parameters)
