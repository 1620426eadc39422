"""What FSDP2 holds on a rank and sends in a step.

Formulas; knows no model and no process group.
"""

from collections.abc import Iterable

from torch import nn

from scalevit.engines.cost import FP32_BYTES, EngineCost, MemoryUse, ParameterLayout, Traffic, Workload
from scalevit.engines.fsdp.settings import FsdpSettings


def fsdp_cost(settings: FsdpSettings, layout: ParameterLayout, workload: Workload) -> EngineCost:
    """See `EngineSettings.cost`."""
    shards = settings.shard_size or workload.ranks
    full, trained = _padded_bytes(layout.parameters, shards), _padded_bytes(layout.trained, shards)
    root = _padded_bytes(layout.root, shards)
    unit_sizes = [_padded_bytes(unit, shards) for unit in layout.units]
    units, largest = sum(unit_sizes), max(unit_sizes)
    shard, trained_shard = full // shards, trained // shards
    # The root stays gathered from forward to backward, and so do the units without resharding. With it, only the
    # present and the next unit are gathered. A unit is copied into a flat buffer to be gathered or reduced.
    # Gradients are accumulated and reduced in fp32, whatever the type of the weights.
    share = workload.weight_bytes / FP32_BYTES
    gathered = root + (min(units, 2 * largest) if settings.reshard_after_forward else units)
    memory = MemoryUse(
        weights=int(share * shard),
        optimizer=int(share * workload.optimizer_tensors * trained_shard),
        gradients=int(share * trained_shard),
        ema=shard if workload.ema else 0,
        # Gradients stay unreduced until the last micro-batch.
        backward_buffers=int(share * gathered) + max(root, largest) + (trained if workload.accumulation > 1 else 0),
        step_buffers=0,
    )
    # Without resharding, the units stay gathered until the last micro-batch's backward.
    all_gather = workload.accumulation * (full + units) if settings.reshard_after_forward else full
    all_reduce = trained_shard if shards < workload.ranks else 0
    traffic = Traffic(all_reduce=all_reduce, reduce_scatter=trained, all_gather=int(share * all_gather), shards=shards)
    return EngineCost(memory, traffic, updated_bytes=int(share * trained_shard))


def _padded_bytes(parameters: Iterable[nn.Parameter], shards: int) -> int:
    """Size in fp32. FSDP2 cuts the first dimension into equal chunks and pads the last ones."""
    return sum(FP32_BYTES * shards * -(-p.shape[0] // shards) * (p.numel() // p.shape[0]) for p in parameters)
