"""What DeepSpeed 0.19's ZeRO holds on a rank and sends in a step, around an fp32 model.

Formulas; knows no model and no process group, and does not import DeepSpeed.
"""

from scalevit.engines.cost import FP32_BYTES, EngineCost, MemoryUse, ParameterLayout, Traffic, Workload, parameter_bytes
from scalevit.engines.deepspeed.settings import DeepSpeedSettings


def deepspeed_cost(settings: DeepSpeedSettings, layout: ParameterLayout, workload: Workload) -> EngineCost:
    """See `EngineSettings.cost`."""
    cost = {0: _replicated, 1: _sharded_optimizer, 2: _sharded_optimizer, 3: _sharded_parameters}[settings.stage]
    return cost(settings, layout, workload)


def _replicated(settings: DeepSpeedSettings, layout: ParameterLayout, workload: Workload) -> EngineCost:
    """Stage 0."""
    full, trained = parameter_bytes(layout.parameters), parameter_bytes(layout.trained)
    memory = MemoryUse(
        weights=full,
        optimizer=workload.optimizer_tensors * trained,
        gradients=trained,
        ema=full if workload.ema else 0,
        # All gradients are flattened into one buffer, and copied back from it.
        backward_buffers=trained * (2 if workload.accumulation > 1 else 1),
        step_buffers=2 * trained,
    )
    return EngineCost(memory, Traffic(all_reduce=trained), updated_bytes=trained)


def _sharded_optimizer(settings: DeepSpeedSettings, layout: ParameterLayout, workload: Workload) -> EngineCost:
    """Stages 1 and 2."""
    full, trained = parameter_bytes(layout.parameters), parameter_bytes(layout.trained)
    shard = trained // workload.ranks
    # A bucket is allocated at its full size, even for a smaller model.
    buckets = _bucket_bytes(settings) * (2 if settings.overlaps_communication else 1)
    if settings.stage == 1:  # unreduced gradients wait for the last micro-batch
        backward = buckets + trained * (2 if workload.accumulation > 1 else 1)
        step = buckets + 3 * trained - shard
    else:
        backward = buckets + trained + (shard if workload.accumulation > 1 else 0)
        step = 0
    memory = MemoryUse(
        weights=full,
        optimizer=(1 + workload.optimizer_tensors) * shard,
        gradients=shard,
        ema=full if workload.ema else 0,
        backward_buffers=backward,
        step_buffers=step,
    )
    # Both stages reduce by all-reduce (`use_multi_rank_bucket_allreduce`), stage 2 after every micro-batch.
    reductions = workload.accumulation if settings.stage == 2 else 1
    return EngineCost(memory, Traffic(all_reduce=reductions * trained, all_gather=trained), updated_bytes=shard)


def _sharded_parameters(settings: DeepSpeedSettings, layout: ParameterLayout, workload: Workload) -> EngineCost:
    """Stage 3."""
    parameters = layout.parameters
    full, trained = parameter_bytes(parameters), parameter_bytes(layout.trained)
    shard, trained_shard = (
        sum(FP32_BYTES * -(-p.numel() // workload.ranks) for p in some) for some in (parameters, layout.trained)
    )
    threshold = _zero_setting(settings, "param_persistence_threshold", 1e5)
    persistent = parameter_bytes(p for p in parameters if p.numel() <= threshold)
    # Parameters stay gathered from forward to backward where both limits allow it. With the default limits, only
    # models above 5e8 parameters are gathered twice.
    count = full // FP32_BYTES
    stays_gathered = 2 * count <= _zero_setting(settings, "max_reuse_distance", 1e9) and count <= _zero_setting(
        settings, "max_live_parameters", 1e9
    )
    bucket = _bucket_bytes(settings)
    largest = max(parameter_bytes(unit) for unit in [layout.root, *layout.units])
    remote = full - persistent if workload.ranks > 1 else 0  # what has to be gathered
    gathered = remote if stays_gathered else min(remote, 2 * largest)
    memory = MemoryUse(
        weights=shard + (persistent if workload.ranks > 1 else 0),
        optimizer=(1 + workload.optimizer_tensors) * trained_shard,
        gradients=trained_shard,
        ema=shard if workload.ema else 0,
        # Unreduced gradients wait until they fill a bucket, and are then copied into a flat buffer.
        backward_buffers=trained_shard + bucket + gathered + min(trained, bucket),
        step_buffers=bucket + gathered + 2 * min(trained, bucket),
    )
    gathered_per_micro_batch = full - persistent
    if not stays_gathered:  # in the forward and in the backward, and a shared MLP once for each of its uses
        gathered_per_micro_batch += parameter_bytes(p for p in layout.reused if p.numel() > threshold)
        gathered_per_micro_batch *= 2
    traffic = Traffic(
        reduce_scatter=workload.accumulation * trained,
        all_gather=workload.accumulation * gathered_per_micro_batch + persistent,
    )
    return EngineCost(memory, traffic, updated_bytes=trained_shard)


def _bucket_bytes(settings: DeepSpeedSettings) -> int:
    return FP32_BYTES * int(_zero_setting(settings, "reduce_bucket_size", 5e8))


def _zero_setting(settings: DeepSpeedSettings, key: str, default: float) -> float:
    """A native setting of `zero_optimization`, under either of its names."""
    zero = settings.native.get("zero_optimization", {})
    return zero.get(f"stage3_{key}", zero.get(key, default))
