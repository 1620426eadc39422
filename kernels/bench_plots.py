"""The benchmark's two figures. matplotlib is optional and imported only when they are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from scalevit.kernels.bench_results import TOKENS, BenchRow

BYTES = 2  # per element; the roofline is drawn for 2-byte dtypes
PLOTS_MISSING = "no figures are drawn: matplotlib is not installed (pip install matplotlib)"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_plots(folder: Path, results: Sequence[BenchRow], about: Mapping[str, object]) -> None:
    """Writes speedup.png and roofline.png. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    plot_speedup(results, str(about["device"]), folder / "speedup.png")
    plot_roofline(results, about, folder / "roofline.png")


def plot_speedup(results: Sequence[BenchRow], device: str, path: Path) -> None:
    """Speed-up over eager of forward + backward: one group of bars per shape and batch."""
    from matplotlib import pyplot as plt

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


def plot_roofline(results: Sequence[BenchRow], about: Mapping[str, object], path: Path) -> None:
    """TFLOP/s of forward + backward against operations per byte, under the measured ceilings."""
    from matplotlib import pyplot as plt

    gemm, copy = float(str(about["gemm_ceiling_tflops"])), float(str(about["copy_ceiling_bytes_per_second"]))
    full = [r for r in results if r.what == "full"]
    figure, axes = plt.subplots(figsize=(6, 4))
    xs = [2.0**i for i in range(4, 13)]
    axes.loglog(xs, [min(gemm, x * copy * 1e-12) for x in xs], color="black", label="measured ceilings")
    for name in dict.fromkeys(r.provider for r in full):
        mine = [r for r in full if r.provider == name]
        axes.loglog([_intensity(r) for r in mine], [r.tflops for r in mine], "o", markersize=4, label=name)
    axes.set_xlabel("operations per byte of minimum traffic")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"fused MLP on {about['device']}, forward + backward")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _intensity(r: BenchRow) -> float:
    """Operations per byte of each product's operands and result, each read or written once."""
    m = r.batch * TOKENS
    each = m * r.d + m * r.h + r.d * r.h
    return 2 * m * r.d * r.h / (BYTES * each)
