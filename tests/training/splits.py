"""One training run under every number of ranks, micro-batch size and engine: how far the results are apart.

As a script this runs the whole table and writes it down (about half an hour on 2 cores):

    python tests/training/splits.py --output docs/results
"""

import argparse
import csv
import itertools
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from launching import QUICKSTART, Workplace, metrics
from scalevit.data.order.batching import Split
from scalevit.runs.environment import describe_environment

STEPS, GLOBAL_BATCH = 24, 20
# Everything that is random is on, and so is everything that sums over rows or parameters.
SETTINGS = [
    "model.kwargs.depth=4",
    "model.kwargs.embed_dim=48",
    "model.drop_path=0.2",
    "model.kwargs.proj_drop_rate=0.1",
    "data.workers=0",
    "data.augmentation.aug_repeats=3",
    "data.augmentation.mixup=0.8",
    "data.augmentation.cutmix=1.0",
    "data.augmentation.mixing_group=8",
    "data.augmentation.random_erasing=0.25",
    "loss.label_smoothing=0.1",
    "optimizer.clip_grad=1.0",
    "ema.decay=0.99",
    f"train.global_batch={GLOBAL_BATCH}",
    "train.log_every_steps=1",
    "train.checkpoint.every_epochs=50",
    "evaluation.every_epochs=50",
    # A key bias has no gradient but rounding noise, which Adam's 1e-8 would enlarge to whole steps.
    "optimizer.args.eps=1e-4",
]
ENGINES = {"zero1": ["engine.stage=1"], "zero3": ["engine.stage=3"], "fsdp": ["engine.name=fsdp"]}
# A teacher that is initialised from the seed, of another width and normalisation.
TEACHER = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
VARIANTS = {
    "": [],
    "compiled": ["train.compile=true"],
    "recomputed": ["train.activation_checkpointing=true"],
    "distilled": [
        "task.name=distillation",
        "task.method=features",
        "task.teacher.name=deit_tiny_patch16_224",
        "task.teacher.pretrained=false",
        "task.teacher.sharded=true",
        *(f"task.teacher.kwargs.{key}={value}" for key, value in TEACHER.items()),
    ],
    "nested": ["task.name=nested_width", "task.random_widths=1", "model.kwargs.proj_drop_rate=0.0"],
}


@dataclass(frozen=True)
class Cell:
    engine: str
    ranks: int
    micro_batch: str
    """A number or "auto"."""
    variant: str = ""

    @property
    def name(self) -> str:
        return "-".join([self.engine, f"{self.ranks}x{self.micro_batch}", *([self.variant] if self.variant else [])])

    @property
    def settings(self) -> list[str]:
        return [f"train.micro_batch={self.micro_batch}", *ENGINES[self.engine], *VARIANTS[self.variant]]


REFERENCE = Cell("zero1", 1, str(GLOBAL_BATCH))
"""One process, one micro-batch."""


def whole_table() -> list[Cell]:
    cells = [Cell(*values) for values in itertools.product(ENGINES, (1, 2, 3, 4, 5, 8), ("1", "2", "5", "auto"))]
    variants = itertools.product(ENGINES, ((1, "auto"), (3, "5"), (5, "2")), ("compiled", "recomputed"))
    return [*cells, *(Cell(engine, *split, variant) for engine, split, variant in variants)]


def run_cells(cells: list[Cell], folder: Path) -> dict[Cell, dict[str, Any]]:
    """Results of cells, one after another."""
    workplace = Workplace(folder)
    return {cell: run_cell(workplace, cell) for cell in cells}


def run_cell(workplace: Workplace, cell: Cell, *, steps: int = STEPS) -> dict[str, Any]:
    """Trains a cell; returns its losses, gradient norms, and both sets of final weights."""
    done = workplace.run(cell.name, arguments(cell, steps=steps), ranks=cell.ranks)
    assert done.status == 0, done.output[-3000:]
    return result(workplace.folder / "runs" / cell.name, steps)


def arguments(cell: Cell, *, steps: int = STEPS) -> list[str]:
    """Of `launch/train.py`."""
    named = ["--config", QUICKSTART, f"name={cell.name}", f"train.max_steps={steps}"]
    return [*named, *SETTINGS, *cell.settings]


def result(run: Path, steps: int = STEPS) -> dict[str, Any]:
    """What a run left in its folder."""
    records = metrics(run)
    assert len(records) == steps
    return {
        "losses": [record["loss"] for record in records],
        "grad_norms": [record["grad_norm"] for record in records],
        "weights": load_file(run / "final.safetensors"),
        "ema": load_file(run / "final_ema.safetensors"),
    }


def deviations(ours: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest relative deviation of a step's loss and gradient norm; that of all final weights by their norm."""
    relative = {
        key: max(abs(a - b) / abs(b) for a, b in zip(ours[key], expected[key], strict=True))
        for key in ("losses", "grad_norms")
    }
    return relative | {key: _distance(ours[key], expected[key]) for key in ("weights", "ema")}


def _distance(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert ours.keys() == expected.keys()
    squares = sum(float(np.square(ours[name] - tensor, dtype=np.float64).sum()) for name, tensor in expected.items())
    norm = sum(float(np.square(tensor, dtype=np.float64).sum()) for tensor in expected.values())
    return (squares / norm) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        results = run_cells([REFERENCE, *whole_table()], Path(folder))
    rows = []
    for cell in whole_table():
        split = Split(GLOBAL_BATCH, cell.ranks, 64 if cell.micro_batch == "auto" else int(cell.micro_batch))
        about = asdict(cell) | {"rows_of_weight_0": split.padding}
        rows.append(about | deviations(results[cell], results[REFERENCE]))
    notes = (
        f"{STEPS} steps of {GLOBAL_BATCH} images in fp32 with mixup, CutMix, erasing, repeats, drop-path, dropout, "
        "label smoothing, clipping and EMA: largest relative deviations from one process with one micro-batch"
    )
    about = {"date": date.today().isoformat(), **describe_environment(8, "cpu"), "what": notes}
    (output / "splits.json").write_text(json.dumps(about | {"cells": rows}, indent=1) + "\n")
    with (output / "splits.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    worst = {key: max(row[key] for row in rows) for key in ("losses", "grad_norms", "weights", "ema")}
    print(f"{len(rows)} cells; largest deviations: {worst}")


if __name__ == "__main__":
    main()
