"""What training images look like after augmentation: both of our transform paths against timm's loader with prefetcher.

As a script this measures 20,000 images of each and writes docs/results/augmentation_statistics.json and .csv (minutes):

    python tests/data/augmentation_statistics.py --output docs/results

Three passes. "recipe" is the paper's, without mixing: counts of RandAugment's operations, the pixels, what is erased.
"geometry" has images whose colours are coordinates, and nothing that changes colours: crops and flips are read from the
pixels. "mixing" has images of one colour: what is erased after, or before, they are mixed. The source images are the
same for all, and small; everything random is drawn independently.
"""

import argparse
import csv
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp
from timm.data import FastCollateMixup, create_loader
from timm.data.auto_augment import AugmentOp
from torch import Tensor

from scalevit.data.transforms.base import TrainingAugmentation
from scalevit.data.transforms.device import DeviceTransform
from scalevit.data.transforms.fast import FastTraining
from scalevit.data.transforms.mixing import BatchMixing
from scalevit.data.transforms.timm_pipeline import TimmTraining
from scalevit.randomness import Purpose, row_keys, seed_sample
from scalevit.runs.environment import describe_environment

IMAGES, BATCH, SIDE, SOURCES = 20_000, 50, 32, 40
WIDTH, HEIGHT = 64, 48
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICY, ERASING = "rand-m9-mstd0.5-inc1", 0.25
TIMM, OWN, FAST = "timm's loader with prefetcher", "ours, timm's transforms", "ours, fast path"
BEFORE = "ours, erased before mixing"

Values = dict[str, np.ndarray]
"""A value of each image (or a count of each kind), by statistic."""


def pictures() -> list[np.ndarray]:
    """Smooth shapes with some noise, and every third one without contrast or nearly so."""
    source = np.random.default_rng(0)
    found = []
    for number in range(SOURCES):
        low = source.integers(0, 256, (4, 5, 3), np.uint8)
        smooth = np.array(Image.fromarray(low).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(float)
        noisy = smooth * (0.3 if number % 3 == 0 else 1.0) + source.normal(0, 12, smooth.shape)
        found.append(noisy.clip(0, 255).astype(np.uint8))
    return found


def coordinates() -> list[np.ndarray]:
    """One image: red is 4 times the column, green 5 times the row."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, :, 0] = 4 * np.arange(WIDTH)
    pixels[:, :, 1] = 5 * np.arange(HEIGHT)[:, None]
    return [pixels]


class Repeated(torch.utils.data.Dataset[Any]):
    """The sources in turn, for timm's loader, which sets the transform."""

    def __init__(self, sources: list[np.ndarray], count: int) -> None:
        self.sources, self.count = [Image.fromarray(each) for each in sources], count
        self.transform: Callable[[Image.Image], Any] = lambda image: image

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self.transform(self.sources[number % len(self.sources)]), 0


def batches_of_timm(
    sources: list[np.ndarray], count: int, *, erasing: float, collate: Any = None, **recipe: Any
) -> Iterator[Tensor]:
    """(b, 3, S, S), normalised, as timm's trainer sees them."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    loader = create_loader(
        Repeated(sources, count), (3, SIDE, SIDE), BATCH, is_training=True, re_prob=erasing, re_mode="pixel",
        interpolation="random", mean=MEAN, std=STD, num_workers=0, collate_fn=collate, persistent_workers=False,
        device=torch.device("cpu"), use_prefetcher=True, **recipe,
    )  # fmt: skip
    return (images for images, _ in loader)


def batches_of_ours(
    sources: list[np.ndarray], count: int, *, fast: bool, erasing: float, **recipe: Any
) -> Iterator[Tensor]:
    """As `ShardDataset` and the training step make them."""
    transform = (FastTraining if fast else TimmTraining)(TrainingAugmentation(image_size=SIDE, mean=MEAN, **recipe))
    finish = DeviceTransform(mean=MEAN, std=STD, random_erasing=erasing)
    inputs: list[Any] = list(sources) if fast else [Image.fromarray(each) for each in sources]
    for start in range(0, count, BATCH):
        images = []
        for position in range(start, start + BATCH):
            seed_sample(int(fast) + 2, position, 0)
            images.append(transform(inputs[position % len(inputs)]))
        keys = row_keys(int(fast) + 2, Purpose.ERASING, start // BATCH, np.arange(BATCH))
        yield finish(torch.stack(images), keys)


@contextmanager
def counted_operations() -> Iterator[Counter[str]]:
    """Counts the operations of a policy that are applied, while the block runs."""
    counts: Counter[str] = Counter()
    original = AugmentOp.__call__

    def call(self: Any, image: Any) -> Any:
        apply = self.aug_fn
        self.aug_fn = lambda *values, **named: (counts.update([self.name]), apply(*values, **named))[1]
        try:
            return original(self, image)
        finally:
            self.aug_fn = apply

    AugmentOp.__call__ = call
    try:
        yield counts
    finally:
        AugmentOp.__call__ = original


def levels(images: Tensor) -> Tensor:
    """Normalised images back to 0..255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images * std + mean) * 255


def recipe_values(batches: Iterator[Tensor]) -> Values:
    """Erased are the pixels whose values are no whole levels; the mean and variance of the pixels are without them."""
    found: dict[str, list[float]] = {"erased": [], "erased area": [], "pixel mean": [], "pixel variance": []}
    with counted_operations() as counts:
        for images in batches:
            values = levels(images)
            erased = ((values - values.round()).abs() > 0.01).any(1)
            for image, where in zip(values, erased, strict=True):
                area = float(where.float().mean())
                found["erased"].append(area > 0)
                if area:
                    found["erased area"].append(area)
                kept = image[:, ~where]
                found["pixel mean"].append(float(kept.mean()))
                found["pixel variance"].append(float(kept.var()))
    names = sorted(counts)
    return {name: np.array(each, float) for name, each in found.items()} | {
        "operations": np.array([counts[name] for name in names]), "names of operations": np.array(names)
    }  # fmt: skip


def geometry_values(batches: Iterator[Tensor]) -> Values:
    """Of the crop from the slope of the colours in the middle; a narrower slope is a smaller crop."""
    found: dict[str, list[np.ndarray]] = {"flipped": [], "crop area": [], "crop ratio": []}
    low, high = SIDE // 4, SIDE - SIDE // 4 - 1
    for images in batches:
        values = levels(images).numpy()
        columns, rows = values[:, 0].mean(1), values[:, 1].mean(2)
        width = (columns[:, high] - columns[:, low]) / (high - low) * SIDE / 4
        height = (rows[:, high] - rows[:, low]) / (high - low) * SIDE / 5
        found["flipped"].append(width < 0)
        found["crop area"].append(abs(width) * height / (WIDTH * HEIGHT))
        found["crop ratio"].append(np.log(abs(width) / height))
    return {name: np.concatenate(each).astype(float) for name, each in found.items()}


def mixing_values(batches: Iterator[Tensor]) -> Values:
    """Of images of one colour: pixels of other values are erased."""
    areas = np.concatenate([((levels(images) - 128).abs() > 0.01).any(1).float().mean((1, 2)) for images in batches])
    return {"erased, mixed": (areas > 0).astype(float), "erased area, mixed": areas[areas > 0]}


def mixed_by_timm(count: int) -> Iterator[Tensor]:
    collate = FastCollateMixup(0.8, 1.0, prob=1.0, switch_prob=0.5, mode="batch", num_classes=2)
    plain = {"scale": (1, 1), "ratio": (1, 1), "hflip": 0, "color_jitter": 0}
    grey = np.full((SIDE, SIDE, 3), 128, np.uint8)
    return batches_of_timm([grey], count, erasing=ERASING, collate=collate, **plain)


def mixed_by_us(count: int, *, first: bool) -> Iterator[Tensor]:
    """In the order of the training step (`erase`): mixed first, or erased first."""
    mixing = BatchMixing(mixup=0.8, cutmix=1.0, group=BATCH, unnormalised=first, seed=4)
    finish, rows = DeviceTransform(mean=MEAN, std=STD, random_erasing=ERASING), np.arange(BATCH)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    for step in range(count // BATCH):
        images = torch.full((BATCH, 3, SIDE, SIDE), 128, dtype=torch.uint8)
        keys = row_keys(4, Purpose.ERASING, step, rows)
        if first:
            yield finish(mixing(images, labels, step=step, rows=rows)[0], keys)
        else:
            yield mixing(finish(images, keys), labels, step=step, rows=rows)[0]


def measure(count: int) -> dict[str, Values]:
    """All statistics of `count` images by contestant."""
    found: dict[str, Values] = {TIMM: {}, OWN: {}, FAST: {}, BEFORE: {}}
    plain = {"color_jitter": 0}
    for sources, recipe, erasing, values in (
        (pictures(), {"auto_augment": POLICY}, ERASING, recipe_values),
        (coordinates(), plain, 0.0, geometry_values),
    ):
        found[TIMM] |= values(batches_of_timm(sources, count, erasing=erasing, **recipe))
        for name in (OWN, FAST):
            found[name] |= values(batches_of_ours(sources, count, fast=name == FAST, erasing=erasing, **recipe))
    found[TIMM] |= mixing_values(mixed_by_timm(count))
    found[OWN] |= mixing_values(mixed_by_us(count, first=True))
    found[BEFORE] |= mixing_values(mixed_by_us(count, first=False))
    return found


def compared(found: dict[str, Values]) -> list[dict[str, Any]]:
    """A row for each statistic and contestant: the mean, and how far it is from timm's.

    `z`: difference of the means over its standard error. `p`: of the two-sample test of Kolmogorov and Smirnov, for the
    counts of operations of a chi-square test.
    """
    rows = []
    for contestant, values in found.items():
        for name, own in values.items():
            theirs = found[TIMM][name]
            if name == "names of operations":
                assert own.tolist() == theirs.tolist()
                continue
            row: dict[str, Any] = {"statistic": name, "of": contestant, "images": len(own), "mean": float(own.mean())}
            if name == "operations":
                row |= {"images": None, "mean": None, "z": None, "p": float(chi2_contingency([own, theirs]).pvalue)}
            else:
                error = (own.var() / len(own) + theirs.var() / len(theirs)) ** 0.5
                row |= {
                    "z": float((own.mean() - theirs.mean()) / error),
                    "p": float(ks_2samp(own, theirs, method="asymp").pvalue),
                }
            rows.append(row | {"agrees": agrees(row["z"], row["p"])})
    return rows


def agrees(z: float | None, p: float) -> bool:
    """Within sampling error. Where nothing differs, each of some 20 comparisons fails with a chance of 2e-4."""
    return (z is None or abs(z) < 4) and p > 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--images", type=int, default=IMAGES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.images)
    rows = compared(found)
    operations = {
        name: dict(zip(values["names of operations"].tolist(), values["operations"].tolist(), strict=True))
        for name, values in found.items()
        if "operations" in values
    }
    about = {
        "date": date.today().isoformat(),
        **describe_environment(1, "cpu"),
        "command": f"python tests/data/augmentation_statistics.py --images {arguments.images}",
        "images": f"{arguments.images} of {SIDE} px, from {SOURCES} generated ones of {WIDTH} x {HEIGHT}",
        "recipe": {"auto_augment": POLICY, "random_erasing": ERASING, "mixup": 0.8, "cutmix": 1.0},
        "crop ratio": "natural logarithm of width over height",
    }
    content = about | {"statistics": rows, "operations": operations}
    (arguments.output / "augmentation_statistics.json").write_text(json.dumps(content, indent=1) + "\n")
    with (arguments.output / "augmentation_statistics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
