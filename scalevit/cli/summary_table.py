"""The table that a person reads at the end of a run. Knows the summary; computes nothing."""

from pathlib import Path

from rich.table import Table

from scalevit.runs.summary import Summary
from scalevit.terminal import print_table


def print_summary(summary: Summary, folder: Path) -> None:
    """Prints the result of a run.

    Args:
        summary: of the run.
        folder: the run's.
    """
    table = Table(title=f"{summary.name}: {summary.reduction}, {summary.parameters:,} parameters")
    for heading in ("", "best top-1", "top-5", "epoch", "last top-1", "best - last"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, result in (("weights", summary.weights), ("EMA", summary.ema)):
        if result is not None:
            table.add_row(
                label,
                f"{result.top1:.2f} %",
                f"{result.top5:.2f} %",
                str(result.best_epoch),
                f"{result.final_top1:.2f} %",
                f"{result.peak_to_final_gap:.2f}",
            )
    mfu = "" if summary.mfu is None else f", {100 * summary.mfu:.1f} % MFU"
    ranks = "1 rank" if summary.world_size == 1 else f"{summary.world_size} ranks"
    rate = "-" if summary.images_per_second is None else f"{summary.images_per_second:,.4g}"
    print_table(table, f"{rate} images/s{mfu} on {ranks}; results in {folder}/summary.json")
