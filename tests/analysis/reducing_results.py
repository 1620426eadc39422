"""Trained models that are reduced by each method, before and after fine-tuning, against training from scratch.

Small ViTs on scikit-learn's digits and on a part of Fashion-MNIST (Debian's package dataset-fashion-mnist), some seeds
each, one thread. As a script this trains and writes docs/results/reducing.json and .csv (about three hours
of one core):

    python tests/analysis/reducing_results.py --output docs/results

Finished runs are kept in the folder `--work` (build/reducing), and are not trained a second time.
"""

import argparse
import csv
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

from scalevit.analysis.reducing import calibration_samples, load_trained, reduce_weights
from scalevit.cli.main import main as scalevit
from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.export.measure import measure_weights
from scalevit.models.reductions.method import FitMethod
from scalevit.runs.environment import describe_environment
from scalevit.training.run import prepare

FASHION = Path("/usr/share/datasets/fashion-mnist")
SEEDS = (1, 2, 3, 4, 5)
CALIBRATION = 512
TUNING_EPOCHS = 5
SETTINGS = [
    *("model.kwargs.embed_dim=64", "model.kwargs.num_heads=4", "engine.name=fsdp", "ema.enabled=false"),
    *("data.workers=0", "data.transforms=fast", "train.micro_batch=64", "train.checkpoint.every_epochs=null"),
    *("evaluation.every_epochs=1000", "kernels.mlp=eager"),
]
TUNING = ["optimizer.lr=0.0005", "schedule.warmup_epochs=0.5"]
REDUCTIONS = {
    "none": ["reduction.strategy=none"],
    "grouped": ["reduction.strategy=grouped"],
    "shallow": ["reduction.strategy=shallow"],
    "grouped and shallow": ["reduction.strategy=grouped", "reduction.keep=0.5"],
}


@dataclass(frozen=True)
class DataSet:
    """Where a data set is, and how long is trained on it."""

    name: str
    settings: list[str]
    epochs: int
    what: str


@dataclass(frozen=True)
class Reduced:
    """A reduction of trained weights. `method` None is what training does with unreduced initial weights: the paper's
    scaling for grouped.
    """

    reduction: str
    name: str
    method: FitMethod | None


METHODS = [
    Reduced("grouped", "scaled first", None),
    Reduced("grouped", "first", FitMethod(shared="first", refit=False)),
    Reduced("grouped", "mean", FitMethod(shared="mean", refit=False)),
    Reduced("grouped", "first, refit", FitMethod(shared="first")),
    Reduced("grouped", "mean, refit", FitMethod(shared="mean")),
    Reduced("grouped", "mean, refit, ridge 0.0001", FitMethod(ridge=1e-4)),
    Reduced("shallow", "first", FitMethod(units="first", refit=False)),
    Reduced("shallow", "weights", FitMethod(units="weights", refit=False)),
    Reduced("shallow", "activations", FitMethod(units="activations", refit=False)),
    Reduced("shallow", "first, refit", FitMethod(units="first")),
    Reduced("shallow", "activations, refit", FitMethod(units="activations")),
    Reduced("grouped and shallow", "mean, activations", FitMethod(refit=False)),
    Reduced("grouped and shallow", "mean, activations, refit", FitMethod()),
]
# Fine-tuned a second time, with the unreduced baseline as the teacher.
DISTILLED = ("mean, refit", "activations, refit")


def data_sets(work: Path) -> Iterator[DataSet]:
    """The two sets; writes the shards that are missing."""
    digits = [f"data.{part}={work}/digits/{part}" for part in ("train", "validation")]
    yield DataSet("digits", digits, 30, "scikit-learn's digits: 1,437 training and 360 validation images, 16 px")
    shares = {"train": 1 / 10, "t10k": 1 / 5}
    for part, share in shares.items():
        if not (work / f"fashion-{part}").exists():
            files = {"images": f"{part}-images-idx3-ubyte.gz", "labels": f"{part}-labels-idx1-ubyte.gz"}
            sources = [text for key, name in files.items() for text in (f"--{key}", str(FASHION / name))]
            scalevit(["shards", "write", *sources, "--destination", f"{work}/all-{part}", "--workers", "0"])
            taken = ["--validation", str(share), "--destination", f"{work}/fashion-{part}", "--workers", "0"]
            scalevit(["shards", "split", f"{work}/all-{part}", *taken])
    settings = [f"data.train={work}/fashion-train/validation", f"data.validation={work}/fashion-t10k/validation"]
    settings += ["data.builtin=null", "model.image_size=28", "model.kwargs.patch_size=7"]
    settings += ["optimizer.lr=0.003"]
    what = "Fashion-MNIST: 6,000 of the training images, 2,000 of the test images, both stratified, 28 px"
    yield DataSet("fashion", settings, 25, what)


class Runs:
    """The runs of one data set and seed, each trained once."""

    def __init__(self, data: DataSet, seed: int, work: Path) -> None:
        self.data, self.seed, self.folder = data, seed, work / "runs" / data.name

    def config(self, name: str, epochs: int, settings: list[str]) -> Config:
        own = [f"name={self.seed}-{name}", f"output_dir={self.folder}", f"seed={self.seed}", f"train.epochs={epochs}"]
        return load_config("quickstart", [*SETTINGS, *self.data.settings, *own, *settings])

    def trained(self, name: str, epochs: int, settings: list[str]) -> dict[str, Any]:
        """Trains a run unless it is there; top-1 and parameters at its end."""
        config = self.config(name, epochs, settings)
        path = Path(config.output_dir) / config.name / "summary.json"
        if not path.exists():
            prepare(config).train()
        summary = json.loads(path.read_text())
        return {"top1": summary["final_top1"], "parameters": summary["parameters"]}

    @property
    def baseline(self) -> str:
        return f"model.initial_weights={self.folder}/{self.seed}-baseline/final.safetensors"

    def rows(self) -> Iterator[dict[str, Any]]:
        """One per model; `top1` is that at the end of training, `reduced_top1` that before fine-tuning.

        `distilled_top1` is that of fine-tuning with the baseline as the teacher.
        """
        epochs = self.data.epochs
        yield {"reduction": "none", "method": "baseline", **self.trained("baseline", epochs, REDUCTIONS["none"])}
        tuned = self.trained("tuned", TUNING_EPOCHS, [*REDUCTIONS["none"], *TUNING, self.baseline])
        yield {"reduction": "none", "method": "baseline, fine-tuned", **tuned}
        for reduction in ("grouped", "shallow"):
            run = self.trained(f"scratch-{reduction}", epochs + TUNING_EPOCHS, REDUCTIONS[reduction])
            yield {"reduction": reduction, "method": "from scratch", **run}
        for reduced in METHODS:
            yield {"reduction": reduced.reduction, "method": reduced.name, **self._reduced(reduced)}

    def _reduced(self, reduced: Reduced) -> dict[str, Any]:
        name = f"{reduced.reduction}-{reduced.name}".replace(" ", "_").replace(",", "")
        settings = [*REDUCTIONS[reduced.reduction], *TUNING]
        weights = self.baseline
        if reduced.method is not None:
            trained = load_trained(self.config(name, TUNING_EPOCHS, [*settings, self.baseline]))
            samples = cache(lambda: calibration_samples(trained, CALIBRATION))
            wanted = self.config(name, TUNING_EPOCHS, settings).reduction
            path = self.folder / f"{self.seed}-{name}.safetensors"
            reduce_weights(trained, wanted, reduced.method, samples).write(path)
            weights = f"model.initial_weights={path}"
        before = measure_weights(self.config(name, TUNING_EPOCHS, [*settings, weights]))
        assert before is not None
        row = {"reduced_top1": before.metrics["top1"], "reduced_loss": before.metrics["loss"]}
        row |= self.trained(name, TUNING_EPOCHS, [*settings, weights])
        if reduced.name in DISTILLED:
            teacher = self.baseline.replace("model.initial_weights", "task.teacher.weights")
            taught = [*settings, weights, "task.name=distillation", teacher]
            row["distilled_top1"] = self.trained(f"{name}_distilled", TUNING_EPOCHS, taught)["top1"]
        return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds."""
    found = []
    for key in dict.fromkeys((row["data"], row["reduction"], row["method"]) for row in rows):
        same = [row for row in rows if (row["data"], row["reduction"], row["method"]) == key]
        values: dict[str, Any] = dict(zip(("data", "reduction", "method"), key, strict=True))
        values |= {"seeds": len(same)}
        for name in ("reduced_top1", "reduced_loss", "top1", "distilled_top1"):
            numbers = [row[name] for row in same if name in row]
            values[name] = statistics.mean(numbers) if numbers else None
            values[f"{name}_std"] = statistics.stdev(numbers) if len(numbers) > 1 else None
        found.append(values)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--work", type=Path, default=Path("build/reducing"), help="folder for shards and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    # Threads that share a core with other work wait for each other at every operation.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    sets, rows = list(data_sets(work)), []
    for seed in arguments.seeds:
        for data in sets:
            for row in Runs(data, seed, work).rows():
                rows.append({"data": data.name, "seed": seed, **row})
                print(json.dumps(rows[-1]), flush=True)
    table = summary(rows)
    about = {
        "date": date.today().isoformat(),
        **describe_environment(1, "cpu"),
        "data": {data.name: data.what for data in sets},
        "epochs": {data.name: data.epochs for data in sets} | {"fine-tuning": TUNING_EPOCHS},
        "from scratch": "as many epochs as baseline and fine-tuning together",
        "calibration_images": CALIBRATION,
        "settings": {"all": SETTINGS, "fine-tuning": TUNING, "reductions": REDUCTIONS},
    }
    content = about | {"summary": table, "runs": rows}
    (arguments.output / "reducing.json").write_text(json.dumps(content, indent=1) + "\n")
    with (arguments.output / "reducing.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
