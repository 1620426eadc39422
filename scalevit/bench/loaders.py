"""`scalevit bench data`: images per second of one core for this loader and for others, on the same images in one run.

Each contestant yields batches of augmented training images made by one worker process. The CPU time of that worker and
of the process that collects its batches is measured, so other processes on the machine disturb little; compare only
contestants of one run. Knows loaders, ours and others'; must not know models.
"""

import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from scalevit.errors import UserError, require
from scalevit.files import write_whole, writing_whole
from scalevit.runs.environment import describe_environment

_POLICY = "rand-m9-mstd0.5-inc1"
_SIZE, _BATCH = 224, 32
# Batches until a forked worker has touched the memory that it shares with its parent.
_WARM_UP = 40
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FIELDS = ("contestant", "images_per_cpu_second", "over_timm_wds", "over_timm_wds_prefetcher")


# --- the images -------------------------------------------------------------------------------------------


def photo(seed: int, height: int = 375, width: int = 500) -> np.ndarray:
    """A photo-like image, (height, width, 3) uint8: structure at every scale and a little sensor noise, which as a JPEG
    of quality 96 takes about 110 KB.
    """
    from PIL import Image

    source = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for scale in (3, 6, 12, 24, 48, 96, 192, 384):
        coarse = source.normal(size=(max(2, scale * height // width), scale, 3)).astype(np.float32)
        layers = [
            Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            for channel in range(3)
        ]
        image += np.stack([np.asarray(layer) for layer in layers], -1) * (130 / scale**0.7)
    image += source.normal(size=image.shape) * 7
    return np.clip(image + 128, 0, 255).astype(np.uint8)


def make_images(folder: Path, count: int, classes: int = 10) -> tuple[Path, Path]:
    """An image folder and the shards of the same JPEGs; returns both paths."""
    from PIL import Image

    from scalevit.data.writing.writer import write_image_folder

    images, shards = folder / "images", folder / "shards"
    for number in range(count):
        path = images / f"class{number % classes}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(number)).save(path, quality=96)
    write_image_folder(images, shards, shard_size=-(-count // 4))
    return images, shards


# --- the contestants: each gives endless batches ----------------------------------------------------------


def _ours(shards: str, fast: bool, repeats: int = 1) -> Iterable[Any]:
    from scalevit.cpu import keep_freed_memory
    from scalevit.data.loading.dataset import ShardDataset
    from scalevit.data.loading.train_loader import TrainLoader
    from scalevit.data.order.shuffle import Order
    from scalevit.data.shards.index import load_index
    from scalevit.data.transforms.base import TrainingAugmentation
    from scalevit.data.transforms.device import DeviceTransform
    from scalevit.data.transforms.fast import FastTraining
    from scalevit.data.transforms.timm_pipeline import TimmTraining

    keep_freed_memory()  # as the trainer does on a CPU
    augmentation = TrainingAugmentation(image_size=_SIZE, mean=_MEAN, auto_augment=_POLICY)
    transform = FastTraining(augmentation) if fast else TimmTraining(augmentation)
    dataset = ShardDataset(load_index(shards), transform)
    loader = TrainLoader(
        dataset, Order(len(dataset), 0), global_batch=_BATCH, micro_batch=_BATCH, repeats=repeats, workers=1
    )
    finish = DeviceTransform(mean=_MEAN, std=_STD, random_erasing=0.25)
    return (finish(batch.images) for batch in loader.batches(0))


def _timm_wds(shards: str, prefetcher: bool) -> Iterable[Any]:
    """timm's reader_wds and loader, as its train.py sets them up."""
    import torch
    from timm.data import create_dataset, create_loader

    paths = sorted(Path(shards).glob("*.tar"))
    count = sum(json.loads(path.with_suffix(".json").read_text())["count"] for path in paths)
    info = {"splits": {"train": {
        "name": "train", "num_samples": count, "filenames": [path.name for path in paths],
        "shard_lengths": [json.loads(path.with_suffix(".json").read_text())["count"] for path in paths],
    }}}  # fmt: skip
    (Path(shards) / "_info.json").write_text(json.dumps(info))
    dataset = create_dataset("wds/", root=shards, split="train", is_training=True, batch_size=_BATCH)
    loader = create_loader(
        dataset, (3, _SIZE, _SIZE), _BATCH, is_training=True, auto_augment=_POLICY, interpolation="random",
        re_prob=0.25, re_mode="pixel", mean=_MEAN, std=_STD, num_workers=1, use_prefetcher=prefetcher,
        device=torch.device("cpu"), pin_memory=False,
    )  # fmt: skip
    return (batch[0] for _ in iter(int, 1) for batch in loader)


def _timm_transform() -> Any:
    from timm.data import create_transform

    return create_transform(
        _SIZE, is_training=True, auto_augment=_POLICY, interpolation="random", re_prob=0.25, re_mode="pixel",
        mean=_MEAN, std=_STD,
    )  # fmt: skip


def _webdataset(shards: str) -> Iterable[Any]:
    import torch
    import webdataset

    paths = [str(path) for path in sorted(Path(shards).glob("*.tar"))]
    dataset = webdataset.WebDataset(paths, shardshuffle=4, seed=0).shuffle(200).decode("pil").to_tuple("jpg", "cls")
    dataset = dataset.map_tuple(_timm_transform(), int).repeat()
    loader = torch.utils.data.DataLoader(dataset, batch_size=_BATCH, num_workers=1)
    return (batch[0] for batch in loader)


def _image_folder(images: str) -> Iterable[Any]:
    import torch
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(images, _timm_transform())
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=_BATCH, num_workers=1, shuffle=True, drop_last=True, persistent_workers=True
    )
    return (batch[0] for _ in iter(int, 1) for batch in loader)


_CONTESTANTS: dict[str, Callable[[str, str], Iterable[Any]]] = {
    "ours, fast path": lambda images, shards: _ours(shards, fast=True),
    "ours, timm's transforms": lambda images, shards: _ours(shards, fast=False),
    "ours, fast path, 3 repeats": lambda images, shards: _ours(shards, fast=True, repeats=3),
    "ours, timm's transforms, 3 repeats": lambda images, shards: _ours(shards, fast=False, repeats=3),
    "timm wds": lambda images, shards: _timm_wds(shards, prefetcher=False),
    "timm wds, prefetcher": lambda images, shards: _timm_wds(shards, prefetcher=True),
    "webdataset, timm's transforms": lambda images, shards: _webdataset(shards),
    "torchvision ImageFolder, timm's transforms": lambda images, shards: _image_folder(images),
}


# --- measuring --------------------------------------------------------------------------------------------


def _cpu_seconds() -> float:
    """CPU time of this process and all that it started, including those that have ended. Linux only."""
    ticks = os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry)] = int(fields[1])
            seconds[int(entry)] = sum(map(int, fields[11:15])) / ticks
    mine = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= grown
    return sum(seconds[pid] for pid in mine if pid in seconds)


def measure(name: str, images: str, shards: str, batches: int, rounds: int) -> list[float]:
    """Images per CPU second of a contestant, by round, after a warm-up; `batches` per round."""
    import torch

    torch.set_num_threads(1)
    iterator = iter(_CONTESTANTS[name](images, shards))
    rates = []
    for round_ in range(rounds + 1):
        before = _cpu_seconds()
        for _ in range(batches if round_ else _WARM_UP):
            batch = next(iterator)
            assert batch.shape == (_BATCH, 3, _SIZE, _SIZE)
            assert batch.dtype == torch.float32
        # The kernel counts in ticks; a worker that was ahead may need none.
        rates.append(batches * _BATCH / max(_cpu_seconds() - before, 0.01))
    return rates[1:]


def seconds_to_resume(shards: str, position: int) -> dict[str, float]:
    """Seconds to the first batch at a position: ours, and by skipping samples one by one, from the rate of 2,000."""
    import webdataset

    from scalevit.data.loading.dataset import ShardDataset
    from scalevit.data.loading.train_loader import TrainLoader
    from scalevit.data.order.shuffle import Order
    from scalevit.data.shards.index import load_index
    from scalevit.data.transforms.base import TrainingAugmentation
    from scalevit.data.transforms.fast import FastTraining

    dataset = ShardDataset(load_index(shards), FastTraining(TrainingAugmentation(image_size=_SIZE, mean=_MEAN)))
    loader = TrainLoader(dataset, Order(len(dataset), 0), global_batch=_BATCH, micro_batch=_BATCH)
    next(loader.batches(0))  # the imports
    started = time.perf_counter()
    next(loader.batches(position // _BATCH))
    ours = time.perf_counter() - started
    paths = [str(path) for path in sorted(Path(shards).glob("*.tar"))]
    skipping = iter(webdataset.WebDataset(paths, shardshuffle=False).repeat())
    next(skipping)
    some = 2000
    started = time.perf_counter()
    for _ in range(some):
        next(skipping)
    return {"ours": ours, "skipping": (time.perf_counter() - started) / some * position}


def compare_loaders(images: int, batches: int, rounds: int, output: Path) -> None:
    """Measures every loader on the same images, writes the results and prints them.

    Args:
        images: number of generated JPEGs.
        batches: batches of 32 per loader and round.
        rounds: rounds, of which the median counts.
        output: path of the .csv, .json and .png, without suffix.

    Raises:
        UserError: a loader fails, the output cannot be written, or matplotlib is missing.
    """
    # Before the minutes of measuring.
    require("matplotlib", extra="plots")
    _check_folder(output.parent)
    with tempfile.TemporaryDirectory() as folder:
        images_path, shards_path = make_images(Path(folder), images)
        size = np.mean([path.stat().st_size for path in images_path.rglob("*.jpg")])
        rates: dict[str, list[float]] = {name: [] for name in _CONTESTANTS}
        # Round by round, so that a busy minute of the machine meets all alike.
        for _ in range(rounds):
            for name in _CONTESTANTS:
                rates[name] += _in_fresh_process(name, images_path, shards_path, batches)
        resume = _in_fresh_process("resume", images_path, shards_path, 1)
    about = {
        "images": images,
        "batches": batches,
        "rounds": rounds,
        "mean_jpeg_bytes": round(float(size)),
        "images_per_cpu_second": rates,
        "seconds_to_resume_at_position_1e6": resume,
    }
    try:
        _report(output, rates, resume, about)
    except OSError as error:
        raise UserError(f"{output.parent}: cannot be written ({error.strerror})") from None


def _check_folder(folder: Path) -> None:
    """Creates a folder and a file in it, which is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def _in_fresh_process(name: str, images: Path, shards: Path, batches: int) -> Any:
    program = "import sys; from scalevit.bench.loaders import measure_one; measure_one(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, name, str(images), str(shards), str(batches)],
        capture_output=True, text=True, timeout=1800, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{name}: failed ({(done.stderr.strip().splitlines() or ['no message'])[-1]})")
    return json.loads(done.stdout.splitlines()[-1])


def measure_one(name: str, images: str, shards: str, batches: str) -> None:
    """Prints as JSON what one contestant reaches in one round, or how long resuming takes; ends this process."""
    measured = seconds_to_resume(shards, 10**6) if name == "resume" else measure(name, images, shards, int(batches), 1)
    print(json.dumps(measured), flush=True)
    os._exit(0)  # others' workers and threads may outlast their loader


def _report(output: Path, rates: dict[str, list[float]], resume: dict[str, float], about: dict[str, Any]) -> None:
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    rows = [
        dict(
            zip(_FIELDS, (name, rate, rate / medians["timm wds"], rate / medians["timm wds, prefetcher"]), strict=True)
        )
        for name, rate in sorted(medians.items(), key=lambda item: -item[1])
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _FIELDS)
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
    write_whole(output.with_suffix(".csv"), text.getvalue().encode())
    about = {"date": date.today().isoformat(), **describe_environment(1, "cpu"), **about}
    write_whole(output.with_suffix(".json"), (json.dumps(about, indent=1) + "\n").encode())
    _plot(rows, output.with_suffix(".png"))
    for row in rows:
        print(
            f"{row['contestant']:45s} {row['images_per_cpu_second']:7.0f} images/s/core"
            f" {row['over_timm_wds']:6.2f} x timm wds {row['over_timm_wds_prefetcher']:6.2f} x with prefetcher"
        )
    print(f"resuming at position 10^6: ours {resume['ours']:.2f} s, skipping {resume['skipping']:.0f} s")


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    names = [row["contestant"] for row in reversed(rows)]
    values = [row["over_timm_wds"] for row in reversed(rows)]
    bars = axes.barh(names, values, color=["tab:blue" if name.startswith("ours") else "tab:gray" for name in names])
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("images per CPU second over timm's wds loader")
    axes.margins(x=0.1)
    with writing_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
