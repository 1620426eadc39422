"""What came of a run: best and last epoch, and the table that a person reads."""

from pathlib import Path
from typing import Any

from rich.table import Table

from scalevit.terminal import print_table
from scalevit.training.evaluation import Accuracy


def best_epoch(epochs: list[dict[str, Any]], prefix: str) -> dict[str, Any]:
    """The record with the highest top-1, the earliest of equals."""
    return max(_having(epochs, prefix), key=lambda record: record[f"{prefix}top1"])


def _having(epochs: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """Those that were evaluated with these weights: an EMA may be turned on in the middle of a run."""
    return [record for record in epochs if f"{prefix}top1" in record]


def summarise(epochs: list[dict[str, Any]], prefix: str) -> dict[str, Any]:
    """Best and last epoch, and the gap between them as in the paper (best top-1 minus last top-1)."""
    best, last = best_epoch(epochs, prefix), _having(epochs, prefix)[-1]
    return {
        "top1": best[f"{prefix}top1"],
        "top5": best[f"{prefix}top5"],
        "best_epoch": best["epoch"],
        "final_top1": last[f"{prefix}top1"],
        "final_top5": last[f"{prefix}top5"],
        "peak_to_final_gap": best[f"{prefix}top1"] - last[f"{prefix}top1"],
    }


def describe_accuracies(accuracies: dict[str, Accuracy]) -> str:
    """One line for a person; keys are the prefixes of the records, "" and "ema_"."""
    labels = {"": "weights", "ema_": "EMA"}
    return "; ".join(f"{labels[p]} top-1 {a.top1:.2f} %, top-5 {a.top5:.2f} %" for p, a in accuracies.items())


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """The table at the end of a run."""
    table = Table(title=f"{summary['name']}: {summary['reduction']}, {summary['parameters']:,} parameters")
    for heading in ("", "best top-1", "top-5", "epoch", "last top-1", "gap"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, result in (("weights", summary), ("EMA", summary["ema"])):
        if result is not None:
            table.add_row(
                label,
                f"{result['top1']:.2f} %",
                f"{result['top5']:.2f} %",
                str(result["best_epoch"]),
                f"{result['final_top1']:.2f} %",
                f"{result['peak_to_final_gap']:.2f}",
            )
    mfu = "" if summary["mfu"] is None else f", {100 * summary['mfu']:.1f} % MFU"
    rate = summary["images_per_second"]
    ranks = "1 rank" if summary["world_size"] == 1 else f"{summary['world_size']} ranks"
    print_table(table, f"{rate:,.4g} images/s{mfu} on {ranks}; results in {folder}/summary.json")
