"""Run folders made of records, without training: what `scalevit report` and its tests read."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ENVIRONMENT = {"device": "cpu", "world_size": 1, "cpus": 2, "python": "3.11.7", "packages": {"torch": "2.11.0"}}
PARAMETERS = {"none": 678_634, "grouped": 456_010, "shallow": 456_298, "thin": 456_298}


def records(seed: int, offset: float, *, epochs: int = 8, ema: bool = True) -> list[dict[str, Any]]:
    """Training and evaluation records of one run, which peaks before its end.

    Args:
        seed: of the noise.
        offset: of the accuracies, in percent.
        epochs: of 10 steps.
        ema: whether it is evaluated too.
    """
    random = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        for step in (10 * epoch - 5, 10 * epoch):
            loss = 2.3 * np.exp(-step / 40) + random.normal(0, 0.02)
            found.append({"kind": "train", "step": step, "epoch": epoch, "loss": float(loss), "lr": 1e-3 / epoch})
        evaluation: dict[str, Any] = {"kind": "evaluation", "step": 10 * epoch, "epoch": epoch}
        for prefix in ("", "ema_") if ema else ("",):
            top1 = 90 + offset - 40 * np.exp(-epoch / 2) - 0.8 * max(0, epoch - 6) + random.normal(0, 0.4)
            evaluation |= {f"{prefix}top1": float(top1), f"{prefix}top5": float(top1) + 5, f"{prefix}loss": 10 / top1}
        found.append(evaluation)
    return found


def write_run(
    folder: Path,
    reduction: str = "none",
    seed: int = 0,
    *,
    lines: Sequence[Mapping[str, Any]] = (),
    finished: bool = True,
    **settings: Any,
) -> Path:
    """Writes a run folder.

    Args:
        folder: new; its name is the run's.
        lines: records of metrics.jsonl.
        finished: whether it has a summary.json.
        settings: sections of the config besides the reduction's.
    """
    folder.mkdir(parents=True)
    config = {"name": folder.name, "seed": seed, "reduction": {"strategy": reduction}, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        parameters = PARAMETERS[reduction]
        costs = {"parameters": parameters, "mlp_parameters": parameters // 2, "unique_mlps": 6, "gmacs": 0.0118}
        rate = {"images_per_second": 500.0 + 10 * seed, "precision": "fp32"}
        (folder / "summary.json").write_text(json.dumps({"name": folder.name, **costs, **rate}))
    return folder


def _png() -> str:
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_predictions(folder: Path, **changes: object) -> None:
    """Writes predictions.json and classes.json of three classes into a run folder, with one image in each list."""
    image = {"label": 0, "predicted": 1, "probability": 0.75, "png": _png()}
    content = {"step": 80, "epoch": 8, "weight_set": "ema", "examples": [image], "mistakes": [image]}
    confusion = [[0, 0, 7], [0, 1, 2], [0, 2, 1], [1, 1, 5], [2, 0, 3]]
    (folder / "predictions.json").write_text(json.dumps({**content, "confusion": confusion, **changes}))
    (folder / "classes.json").write_text('["<cat>", "dog", "owl"]')
