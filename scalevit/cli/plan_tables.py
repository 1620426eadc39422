"""The tables of `scalevit plan`, none wider than 100 columns, and the lines below them."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from scalevit.terminal import narrow_table

if TYPE_CHECKING:
    from scalevit.planning.estimate import EstimateRow, RunEstimate


def comparison(estimate: "RunEstimate") -> Table:
    """Every reduction with every engine: what fits and how fast it is."""
    config, train = estimate.config, estimate.config.train
    where = f"{estimate.gpus} x {estimate.device.name}" + (f" on {estimate.nodes} nodes" if estimate.nodes > 1 else "")
    parts = [f"{config.model.name} on {where}", f"global batch {train.global_batch}", train.precision]
    parts.append(f"MLP {estimate.mode}")
    if train.activation_checkpointing:
        parts.append("activation checkpointing")
    table = _table(", ".join(parts), "strategy", "engine", "million\nparameters", *_RUN_HEADINGS)
    for index, row in enumerate(estimate.rows):
        ends = index + 1 == len(estimate.rows) or estimate.rows[index + 1].strategy != row.strategy
        cells = row.strategy, row.engine, f"{row.parameters / 1e6:.3f}", *_run_cells(row, train.global_batch)
        table.add_row(*cells, end_section=ends)
    return table


def memory(estimate: "RunEstimate") -> Table:
    """What a rank's memory holds, for the config's own reduction with every engine."""
    strategy = estimate.config.reduction.kind()
    table = _table(
        f"GB of a rank's memory, {strategy}, by engine", "engine", "images", "weights", "optimizer", "gradients", "EMA",
        "buffers", "activations", "together",
    )  # fmt: skip
    for row in (row for row in estimate.rows if row.strategy == strategy):
        held = row.cost.memory
        sizes = held.weights, held.optimizer, held.gradients, held.ema, held.backward_buffers, row.activation_bytes
        shown = [f"{size / 1e9:.3f}" for size in sizes]
        table.add_row(row.engine, str(row.micro_batch), *shown, f"{row.memory_bytes / 1e9:.2f}")
    return table


def activations(estimate: "RunEstimate") -> Table:
    """What the kernels' save modes and activation checkpointing change, for the config's own reduction."""
    of = f"{estimate.config.reduction.kind()}, {estimate.activations_of} images, {estimate.config.train.precision}"
    table = _table(
        f"GB of activations, {of}", "MLP", "activation\ncheckpointing", "kept for\nthe backward", "at the\npeak"
    )
    for (mode, checkpointing), found in estimate.activations.items():
        sizes = found.saved_bytes, found.peak_bytes
        table.add_row(mode, "on" if checkpointing else "off", *(f"{size / 1e9:.3f}" for size in sizes))
    return table


def scaling(estimates: Sequence["RunEstimate"]) -> Table:
    """The config's own reduction and engine on several numbers of devices."""
    config = estimates[0].config
    parts = [f"{config.model.name} on {estimates[0].device.name}", *_own(estimates[0])]
    parts += [f"global batch {config.train.global_batch}", config.train.precision]
    table = _table(", ".join(parts), "GPUs", "padding", "steps/s", *_RUN_HEADINGS)
    for estimate in estimates:
        row = _own_row(estimate)
        cells = str(estimate.gpus), f"{row.padding:.1%}", f"{row.steps_per_second:.3g}"
        table.add_row(*cells, *_run_cells(row, config.train.global_batch))
    return table


def suggestion(estimate: "RunEstimate") -> str:
    """The largest micro-batch for the config's own reduction and engine."""
    row, (strategy, engine) = _own_row(estimate), _own(estimate)
    what = f"{strategy} with {engine} on {estimate.gpus} {'rank' if estimate.gpus == 1 else 'ranks'}"
    if row.largest_micro_batch is None:
        return f"{what}: not even one image fits; use more ranks, ZeRO 3, FSDP2 or train.activation_checkpointing=true"
    configured, whole = estimate.config.train.micro_batch, -(-estimate.config.train.global_batch // estimate.gpus)
    if configured != "auto" and row.largest_micro_batch >= min(configured, whole):
        if configured >= whole:
            return f"{what}: train.micro_batch={configured} fits; a rank has {whole} images per step"
        return f"{what}: train.micro_batch={configured} fits, and so does {row.largest_micro_batch}"
    if configured == "auto":
        shown = f"{row.accumulation} x {row.micro_batch} images per rank and step, padding {row.padding:.1%}"
        return f'{what}: train.micro_batch="auto" starts at {row.largest_micro_batch} ({shown})'
    return f"{what}: train.micro_batch={configured} does not fit; try train.micro_batch={row.largest_micro_batch}"


def notes(estimate: "RunEstimate") -> Iterator[str]:
    """What the numbers are, and what was left out."""
    device, config = estimate.device, estimate.config
    yield (
        "Bytes are of one rank; GB = 1e9 bytes. Buffers: gathered parameters and gradient buckets (DeepSpeed's have "
        "2 GB each unless engine.native.zero_optimization.reduce_bucket_size is lower). Sent: by each rank, in rings."
    )
    yield (
        f"{device.name}: {device.memory_bytes / 1e9:g} GB, {device.usable_memory:.0%} of it usable; "
        f"{device.flops_16bit / 1e12:g} / {device.flops_32bit / 1e12:g} TFLOP/s (16 / 32 bit) at "
        f"{device.compute_share:.0%}; {device.memory_bandwidth / 1e12:g} TB/s at {device.memory_share:.0%}; links "
        f"{device.link_bandwidth / 1e9:g}, network {device.network_bandwidth / 1e9:g} GB/s at {device.link_share:.0%}. "
        f"Source: {device.source or 'the given file'}. The percentages are assumptions, so images/s are estimates; "
        "data loading is not included."
    )
    yield (
        "Images per rank: micro-batches per step x images; results do not depend on them. The largest micro-batch that "
        "fits is at most a rank's part of the global batch. Padding: rows of weight 0 where ranks and micro-batches do "
        "not divide it."
    )
    if estimate.not_estimated:
        yield f"not estimated, the numbers are those without: {', '.join(estimate.not_estimated)}"
    for strategy, reason in estimate.left_out.items():
        yield f"left out: {strategy} ({reason})"
    engines_of: dict[str, list[str]] = {}
    for engine, reason in estimate.engines_left_out.items():
        engines_of.setdefault(reason, []).append(engine)
    for reason, engines in engines_of.items():
        yield f"left out: {', '.join(engines)} (optimizer.name = {config.optimizer.name}: {reason})"


def savings(estimate: "RunEstimate") -> Iterator[str]:
    """Each reduction against the first, which is the unreduced model, with the config's own engine."""
    baseline, *others = (row for row in estimate.rows if row.engine == estimate.config.engine.label)
    for row in others:
        traffic, full = row.cost.traffic, baseline.cost.traffic
        less = [f"{1 - row.parameters / baseline.parameters:.1%} fewer parameters"]
        less.append(f"{1 - traffic.gradients / full.gradients:.1%} less gradient traffic")
        if full.all_gather:
            less.append(f"{1 - traffic.all_gather / full.all_gather:.1%} less parameter traffic")
        yield f"{row.strategy} against {baseline.strategy}: {', '.join(less)} ({row.engine})"


_RUN_HEADINGS = (
    "images\nper rank", "GB", "fits", "largest\nmicro-\nbatch", "GB sent\nper step", "images/s", "bound by",
)  # fmt: skip


def _run_cells(row: "EstimateRow", global_batch: int) -> tuple[str, ...]:
    """Under `_RUN_HEADINGS`."""
    return (
        f"{row.accumulation} x {row.micro_batch}",
        f"{row.memory_bytes / 1e9:.2f}",
        "yes" if row.fits else "no",
        str(row.largest_micro_batch or "none"),
        f"{row.bytes_sent / 1e9:.3f}",
        f"{row.steps_per_second * global_batch:,.0f}",
        row.bound_by,
    )


def _own(estimate: "RunEstimate") -> tuple[str, str]:
    return estimate.config.reduction.kind(), estimate.config.engine.label


def _own_row(estimate: "RunEstimate") -> "EstimateRow":
    return next(row for row in estimate.rows if (row.strategy, row.engine) == _own(estimate))


def _table(title: str, *headings: str) -> Table:
    return narrow_table(*headings, text=("strategy", "engine", "MLP", "fits", "bound by"), title=title)
