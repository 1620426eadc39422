"""`scalevit bench train`: how fast a config's model trains, each reduction with eager and with fused MLPs, in one run.

Random images that are on the device already: the engine and the model are measured, not the loader. Knows models and
engines through a config; names no reduction, engine, task or loss.
"""

import csv
import gc
import io
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from scalevit.config.tree import Config
from scalevit.cpu import prepare_cpu
from scalevit.data.transforms.mixing import MixedLabels
from scalevit.distributed import World
from scalevit.engines.base import Engine
from scalevit.engines.precision import matmul_precision
from scalevit.engines.settings import UpdateScope
from scalevit.errors import UserError
from scalevit.files import write_whole
from scalevit.models.costs import model_costs
from scalevit.models.dropout import RowKeys
from scalevit.runs.environment import describe_environment
from scalevit.terminal import print_table
from scalevit.training.engine_builder import EngineBuilder, check_engine
from scalevit.training.micro_batch import find_micro_batch
from scalevit.training.tasks.base import DeviceBatch, TaskRunner
from scalevit.training.throughput import peak_flops

_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class BenchRow:
    """One measured config, without gradient accumulation. Times are those of rank 0."""

    strategy: str
    mlp: str
    engine: str
    precision: str
    micro_batch: int
    ranks: int
    milliseconds_p20: float
    milliseconds_p50: float
    milliseconds_p80: float
    images_per_second: float
    """Of all ranks together, at the median time."""
    images_per_second_per_rank: float
    ratio: float
    """Of images_per_second to the first row's."""
    mfu: float | None
    peak_memory_bytes: int | None
    """Of rank 0, on CUDA."""


def compare_training(configs: Sequence[Config], *, steps: int, output: Path | None = None) -> None:
    """Measures training steps of each config, and prints a table with their ratios to the first.

    Args:
        steps: measured optimizer steps per config, at least 2.
        output: folder for bench_train.json and bench_train.csv.

    Raises:
        UserError: an engine cannot run here, a model cannot be built, or the output cannot be written.
    """
    world = World.from_environment()
    rows = _measure_all(configs, world, steps)
    if not world.is_first:
        return
    _print(rows, world.device_name)
    if output is not None:
        _write(rows, output, {"date": date.today().isoformat(), **describe_environment(world.size, world.device_name)})


def _measure_all(configs: Sequence[Config], world: World, steps: int) -> list[BenchRow]:
    """Measures the configs one after another."""
    scopes = [check_engine(config, world) for config in configs]
    if world.device.type == "cpu":
        prepare_cpu(ranks_per_node=world.ranks_per_node)
    rows: list[BenchRow] = []
    with world.process_group(offloads=any(config.engine.offloads for config in configs)):
        found = [
            find_micro_batch(config, world, EngineBuilder(config, world, scope, config.task.build(config, world)))
            for config, scope in zip(configs, scopes, strict=True)
        ]
        for config, scope in zip(configs, scopes, strict=True):
            # One for all that leave it open, so that their rates can be compared.
            batch = min(found) if config.train.micro_batch == "auto" else config.train.micro_batch
            rows.append(_measure(config, world, scope, batch, steps, first=rows[0] if rows else None))
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def _measure(
    config: Config, world: World, scope: UpdateScope, batch: int, steps: int, first: BenchRow | None
) -> BenchRow:
    precision = config.train.precision
    task = config.task.build(config, world)
    engine = EngineBuilder(config, world, scope, task)(micro_batch=batch, accumulation=1)
    with matmul_precision(config.train.matmul_precision):
        seconds = _step_seconds(engine, task, config, batch, world, steps)
    engine.close()
    p20, p50, p80 = (statistics.quantiles(seconds, n=10, method="inclusive")[i] for i in (1, 4, 7))
    per_rank = batch / p50
    rate = per_rank * world.size
    peak = peak_flops(world.device, precision)
    flops = model_costs(config.model, config.reduction).training_flops
    return BenchRow(
        strategy=config.reduction.strategy,
        mlp=config.kernels.mlp,
        engine=config.engine.label,
        precision=precision,
        micro_batch=batch,
        ranks=world.size,
        milliseconds_p20=1e3 * p20,
        milliseconds_p50=1e3 * p50,
        milliseconds_p80=1e3 * p80,
        images_per_second=rate,
        images_per_second_per_rank=per_rank,
        ratio=rate / first.images_per_second if first else 1.0,
        mfu=per_rank * flops / peak if peak else None,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None,
    )


def _step_seconds(
    engine: Engine, task: TaskRunner, config: Config, batch: int, world: World, steps: int
) -> list[float]:
    """Wall-clock time of each measured step on this rank; resets CUDA's peak memory after the warm-up."""
    size, classes, device = config.model.image_size, config.model.num_classes, world.device
    generator = torch.Generator(device).manual_seed(config.seed)
    images = torch.randn(batch, 3, size, size, device=device, generator=generator)
    labels = torch.randint(classes, (batch,), device=device, generator=generator)
    half = torch.full((batch,), 0.5, dtype=torch.float64, device=device)
    rows, mixed = torch.ones(batch, device=device), MixedLabels(labels, labels.flip(0), half)
    keys = RowKeys(engine.module)
    on_gpu = device.type == "cuda"
    seconds = []
    engine.train()
    for step in range(_WARM_UP_STEPS + steps):
        if step == _WARM_UP_STEPS and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        keys.set(config.seed, step, np.arange(batch), device)
        for index in range(task.passes):
            loss = task.loss(engine.forward, DeviceBatch(images, mixed, rows, step), index).total / (batch * world.size)
            engine.backward(loss, last=index == task.passes - 1)
        engine.step(config.peak_lr)
        if on_gpu:
            torch.cuda.synchronize()
        if step >= _WARM_UP_STEPS:
            seconds.append(time.perf_counter() - started)
    return seconds


def _print(rows: Sequence[BenchRow], device: str) -> None:
    first = rows[0]
    table = Table(
        title=f"training steps on {first.ranks} x {device}, {first.engine}, {first.precision}, "
        f"{first.micro_batch} images per rank"
    )
    for heading in ("strategy", "MLP"):
        table.add_column(heading)
    for heading in ("ms p20", "ms p50", "ms p80", "images/s", "images/s\nper rank", "ratio", "MFU", "peak GiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.strategy,
            row.mlp,
            *(f"{value:.1f}" for value in (row.milliseconds_p20, row.milliseconds_p50, row.milliseconds_p80)),
            f"{row.images_per_second:,.0f}",
            f"{row.images_per_second_per_rank:,.0f}",
            f"{row.ratio:.2f}",
            "" if row.mfu is None else f"{100 * row.mfu:.1f} %",
            "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f}",
        )
    print_table(table)


def _write(rows: Sequence[BenchRow], folder: Path, about: dict[str, object]) -> None:
    """Writes bench_train.json and bench_train.csv.

    Raises:
        UserError: the folder cannot be written.
    """
    records = [asdict(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "bench_train.json", (json.dumps({**about, "rows": records}, indent=1) + "\n").encode())
        write_whole(folder / "bench_train.csv", text.getvalue().encode())
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
