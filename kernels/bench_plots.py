"""The benchmark's two pictures. Imports matplotlib, which nothing else here does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from .bench import Result

BYTES = 2  # for each element; the roofline is drawn for 2-byte dtypes


def plot_speedup(results: Sequence[Result], device: str, path: Path) -> None:
    """Speed-up over eager of forward + backward: one group of bars for each shape and batch."""
    full = [r for r in results if r.what == "full"]
    cases = list(dict.fromkeys((r.shape, r.batch, r.autocast) for r in full))
    names = list(dict.fromkeys(r.provider for r in full))
    p50 = {(r.shape, r.batch, r.autocast, r.provider): r.p50 for r in full}
    figure, axes = plt.subplots(figsize=(max(6.0, 1.1 * len(cases)), 4))
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        pairs = [(j, p50.get((*case, "eager")), p50.get((*case, name))) for j, case in enumerate(cases)]
        bars = [(j + i * width, base / mine) for j, base, mine in pairs if base and mine]
        if bars:
            at, heights = zip(*bars, strict=True)
            axes.bar(at, heights, width=width, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(cases))])
    labels = [f"{shape}\n{batch} images" + "\nautocast" * autocast for shape, batch, autocast in cases]
    axes.set_xticklabels(labels, fontsize=7)
    axes.set_ylabel("speed-up over eager, forward + backward")
    axes.set_title(f"fused MLP on {device}")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_roofline(results: Sequence[Result], about: Mapping[str, object], path: Path) -> None:
    """TFLOP/s of forward + backward against operations for each byte, under the measured ceilings."""
    gemm, copy = float(str(about["gemm_ceiling_tflops"])), float(str(about["copy_ceiling_bytes_per_second"]))
    full = [r for r in results if r.what == "full"]
    figure, axes = plt.subplots(figsize=(6, 4))
    xs = [2.0**i for i in range(4, 13)]
    axes.loglog(xs, [min(gemm, x * copy * 1e-12) for x in xs], color="black", label="measured ceilings")
    for name in dict.fromkeys(r.provider for r in full):
        mine = [r for r in full if r.provider == name]
        axes.loglog([_intensity(r) for r in mine], [r.tflops for r in mine], "o", markersize=4, label=name)
    axes.set_xlabel("operations for each byte that must move at least")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"fused MLP on {about['device']}, forward + backward")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _intensity(r: Result) -> float:
    """Operations over the bytes of each product's operands and result, read or written once."""
    m = r.batch * 197
    each = m * r.d + m * r.h + r.d * r.h
    return 2 * m * r.d * r.h / (BYTES * each)
