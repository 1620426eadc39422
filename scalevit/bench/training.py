"""`scalevit bench train`: how fast a config's model trains, each strategy with eager and with fused MLPs, in one run.

Random images that lie on the device already: the engine and the model are measured, not the loader.
"""

import csv
import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table

from scalevit.config.tree import Config
from scalevit.distributed import World
from scalevit.engines.factory import check_engine
from scalevit.models.costs import model_costs
from scalevit.runs.folder import describe_environment
from scalevit.terminal import print_table
from scalevit.training.run import prepare_engine
from scalevit.training.throughput import peak_flops

_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Row:
    """One measured combination; `ratio` is to the first row."""

    strategy: str
    mlp: str
    engine: str
    precision: str
    micro_batch: int
    milliseconds_p20: float
    milliseconds_p50: float
    milliseconds_p80: float
    images_per_second: float
    ratio: float
    mfu: float | None
    peak_memory_bytes: int | None


def compare_training(configs: Sequence[Config], *, steps: int, output: Path | None = None) -> None:
    """Measures training steps of each config, and prints a table with their ratios to the first.

    Args:
        steps: measured optimizer steps per config, at least 2.
        output: folder for bench_train.json and bench_train.csv.

    Raises:
        UserError: as `build_model`.
    """
    world = World.from_environment()
    rows: list[Row] = []
    for config in configs:
        check_engine(config.engine, world)
    with world.process_group(offloads=any(config.engine.offloads for config in configs)):
        for config in configs:
            rows.append(_measure(config, world, steps, first=rows[0] if rows else None))
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    if not world.is_first:
        return
    _print(rows, device)
    if output is not None:
        _write(rows, output, {"date": date.today().isoformat(), **describe_environment(world.size, device)})


def _measure(config: Config, world: World, steps: int, first: Row | None) -> Row:
    size, classes, batch = config.model.image_size, config.model.num_classes, config.train.micro_batch
    one_batch = config.train.model_copy(update={"global_batch": batch * world.size})
    config = config.model_copy(update={"train": one_batch})
    engine = prepare_engine(config, world)()
    engine.train()
    generator = torch.Generator(world.device).manual_seed(config.seed)
    images = torch.randn(batch, 3, size, size, device=world.device, generator=generator)
    targets = torch.rand(batch, classes, device=world.device, generator=generator).softmax(1)

    on_gpu = world.device.type == "cuda"
    seconds = []
    for step in range(_WARM_UP_STEPS + steps):
        if step == _WARM_UP_STEPS and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = F.cross_entropy(engine(images).float(), targets)
        engine.backward(loss, last=True)
        engine.step(config.optimizer.lr)
        if on_gpu:
            torch.cuda.synchronize()
        if step >= _WARM_UP_STEPS:
            seconds.append(time.perf_counter() - started)
    p20, p50, p80 = (statistics.quantiles(seconds, n=10, method="inclusive")[i] for i in (1, 4, 7))
    rate = batch / p50
    engine.close()
    peak = peak_flops(world.device, config.train.precision)
    flops = model_costs(config.model, config.reduction).training_flops
    return Row(
        strategy=config.reduction.strategy,
        mlp=config.kernels.mlp,
        engine=config.engine.name,
        precision=config.train.precision,
        micro_batch=batch,
        milliseconds_p20=1e3 * p20,
        milliseconds_p50=1e3 * p50,
        milliseconds_p80=1e3 * p80,
        images_per_second=rate,
        ratio=rate / first.images_per_second if first else 1.0,
        mfu=rate * flops / peak if peak else None,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
    )


def _print(rows: list[Row], device: str) -> None:
    table = Table(title=f"training steps on {device}, {rows[0].precision}, batch {rows[0].micro_batch}")
    for heading in ("strategy", "MLP"):
        table.add_column(heading)
    for heading in ("ms p20", "ms p50", "ms p80", "images/s", "ratio", "MFU", "peak GiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.strategy,
            row.mlp,
            *(f"{value:.1f}" for value in (row.milliseconds_p20, row.milliseconds_p50, row.milliseconds_p80)),
            f"{row.images_per_second:,.0f}",
            f"{row.ratio:.2f}",
            "" if row.mfu is None else f"{100 * row.mfu:.1f} %",
            "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f}",
        )
    print_table(table)


def _write(rows: list[Row], folder: Path, about: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    records = [asdict(row) for row in rows]
    (folder / "bench_train.json").write_text(json.dumps({**about, "rows": records}, indent=1) + "\n")
    with (folder / "bench_train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0].keys())
        writer.writeheader()
        writer.writerows(records)
