"""Draws the figures of the README from files under docs/results: `python docs/figures/make_figures.py`.

With `--runs FOLDER` it first collects the summaries of finished runs into docs/results/digits_reductions.json.
"""

import argparse
import json
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

FIGURES = Path(__file__).parent
RESULTS = FIGURES.parent / "results" / "digits_reductions.json"
COLORS = {"none": "#555555", "grouped": "#1f77b4", "shallow": "#d95f02", "thin": "#1b9e77"}
KEPT = ("reduction", "seed", "parameters", "top1", "final_top1", "ema")


def collect(runs: Path) -> None:
    """Writes what the figure needs of every finished run in a folder, with the settings and the environment."""
    finished = sorted(path.parent for path in runs.glob("*/summary.json"))
    summaries = [json.loads((run / "summary.json").read_text()) for run in finished]
    config = json.loads((finished[0] / "config.json").read_text())
    environment = json.loads((finished[0] / "environment.json").read_text())
    content = {
        "date": date.today().isoformat(),
        "command": "scalevit train --config quickstart reduction.strategy=STRATEGY seed=SEED",
        "data": "scikit-learn's handwritten digits: 1,437 training and 360 validation images",
        "model": config["model"],
        "environment": {key: environment[key] for key in ("python", "packages", "git_commit", "cpus", "device")},
        "runs": [{key: summary[key] for key in KEPT} for summary in summaries],
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def parameters_against_accuracy(results: dict[str, Any]) -> None:
    """One point per reduction: mean over seeds, with every seed beside it."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for strategy, color in COLORS.items():
        runs = [run for run in results["runs"] if run["reduction"] == strategy]
        if not runs:
            continue
        scores, parameters = [run["ema"]["top1"] for run in runs], runs[0]["parameters"] / 1e3
        axes.scatter([parameters] * len(scores), scores, color=color, alpha=0.35, s=18)
        axes.scatter([parameters], [statistics.mean(scores)], color=color, s=70, marker="D", label=strategy)
    seeds = len({run["seed"] for run in results["runs"]})
    axes.set_xlabel("parameters (thousands)")
    axes.set_ylabel("best top-1 of the EMA (%)")
    axes.set_title(f"quickstart on handwritten digits, {seeds} seeds (diamonds: means)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(FIGURES / "parameters_accuracy.svg", metadata={"Date": None})
    plt.close(figure)


def pipeline() -> None:
    """The way of a batch, from shards to results."""
    figure, axes = plt.subplots(figsize=(9.2, 3.3), layout="constrained")
    axes.set_axis_off()
    axes.set_xlim(0, 100)
    axes.set_ylim(1, 33)
    boxes = {
        "shards": (2, 20, 16, "WebDataset shards\n+ index", "#e8e8e8"),
        "data": (23, 20, 16, "scalevit.data\norder, transforms,\nloading", "#d6e6f4"),
        "training": (44, 20, 16, "scalevit.training\ntask, loss, EMA,\nevaluation", "#d6e6f4"),
        "engine": (65, 20, 15, "scalevit.engines\nDeepSpeed ZeRO\nor FSDP2", "#d6e6f4"),
        "runs": (84, 20, 14, "run folder,\ntrackers", "#e8e8e8"),
        "models": (44, 3, 16, "scalevit.models\nreduced timm ViT", "#fce3cf"),
        "kernels": (65, 3, 15, "scalevit.kernels\nfused MLPs (Triton)", "#fce3cf"),
        "checkpoint": (84, 3, 14, "scalevit.checkpoint\nany engine,\nany world size", "#d6e6f4"),
        "config": (2, 3, 16, "config (JSON)", "#e8e8e8"),
    }
    for x, y, width, text, color in boxes.values():
        box = plt.Rectangle((x, y), width, 11, facecolor=color, edgecolor="#444444", linewidth=1)
        axes.add_patch(box)
        axes.text(x + width / 2, y + 5.5, text, ha="center", va="center", fontsize=8)
    arrows = [
        ((18, 25.5), (23, 25.5)), ((39, 25.5), (44, 25.5)), ((60, 25.5), (65, 25.5)), ((80, 25.5), (84, 25.5)),
        ((52, 14), (52, 20)), ((60, 8.5), (65, 8.5)), ((80, 22), (84, 12)), ((18, 8.5), (44, 21)),
    ]  # fmt: skip
    for start, end in arrows:
        axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "#444444", "linewidth": 1})
    figure.savefig(FIGURES / "pipeline.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="folder of run folders to collect results from")
    arguments = parser.parse_args()
    plt.switch_backend("svg")
    plt.rcParams["svg.hashsalt"] = "scalevit"  # equal input gives equal files
    if arguments.runs is not None:
        collect(arguments.runs)
    pipeline()
    if RESULTS.exists():
        parameters_against_accuracy(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
