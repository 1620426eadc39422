"""The benchmark's results: rows, CSV and JSON files, printed tables. Must not know how they are measured."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TOKENS = 197  # per image: 14 x 14 patches and the class token


@dataclass(frozen=True)
class BenchRow:
    """One line of the CSV file: one pass of one provider at one shape and batch.

    Attributes:
        autocast: whether x and the weights are fp32 and autocast casts them.
        what: the pass.
        p20, p50, p80: microseconds.
        percent_of_gemm, percent_of_copy: of the measured ceilings; the former by operations, the latter by the bytes of
            all products' operands and results, each moved once.
        peak_bytes: memory that the call adds at its peak. For one MLP it is about the same for all providers, because
            the backward holds buffers of that size in any case.
        kept_bytes: what the call keeps for a backward, besides its arguments and results; this accumulates over blocks
            (see `StackMemory`).
    """

    shape: str
    d: int
    h: int
    batch: int
    autocast: bool
    what: str
    provider: str
    p20: float
    p50: float
    p80: float
    tflops: float
    percent_of_gemm: float
    percent_of_copy: float
    peak_bytes: int
    kept_bytes: int


@dataclass(frozen=True)
class StackMemory:
    """Memory of `blocks` residual MLPs in a row, x + mlp(x), in bytes.

    Attributes:
        peak_bytes: at the peak of forward and backward; includes each block's input and the weights' gradients.
        kept_bytes: between forward and backward; includes each block's input.
    """

    shape: str
    d: int
    h: int
    batch: int
    blocks: int
    provider: str
    peak_bytes: int
    kept_bytes: int


def drift(results: Sequence[BenchRow]) -> float:
    """The largest relative difference of eager's median from that of a later "eager_again" of the same case."""
    eager = {_case(r): r.p50 for r in results if r.provider == "eager"}
    again = [(r.p50, eager.get(_case(r))) for r in results if r.provider == "eager_again"]
    return max((abs(later / first - 1) for later, first in again if first), default=0.0)


def _case(r: BenchRow) -> tuple[object, ...]:
    return r.shape, r.batch, r.autocast, r.what


def write_results(
    folder: Path, results: Sequence[BenchRow], about: dict[str, object], stacks: Sequence[StackMemory] = ()
) -> None:
    """Writes bench.csv and bench.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(r) for r in results]
    with open(folder / "bench.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    content = {"about": about, "drift": drift(results), "results": rows, "stacks": [asdict(s) for s in stacks]}
    (folder / "bench.json").write_text(json.dumps(content, indent=1) + "\n")


def print_results(results: Sequence[BenchRow], before: Sequence[BenchRow] = ()) -> None:
    """Prints a table with each provider's speed-up over eager; eager's results may be in `before`."""
    eager = {_case(r): r.p50 for r in (*before, *results) if r.provider == "eager"}
    print(f"{'shape':12}{'batch':>6} {'pass':10}{'autocast':10}{'provider':27}{'p20':>9}{'p50':>9}{'p80':>9}  us"
          f"{'TFLOP/s':>9}{'% GEMM':>8}{'% copy':>8}{'peak MiB':>10}{'kept MiB':>10}{'x eager':>9}")  # fmt: skip
    for r in results:
        base = eager.get(_case(r))
        ratio = f"{base / r.p50:9.2f}" if base else f"{'':9}"
        memory = f"{r.peak_bytes / 2**20:10.0f}{r.kept_bytes / 2**20:10.0f}"
        print(f"{r.shape:12}{r.batch:6} {r.what:10}{'yes' if r.autocast else 'no':10}{r.provider:27}"
              f"{r.p20:9.0f}{r.p50:9.0f}{r.p80:9.0f}    "
              f"{r.tflops:9.0f}{r.percent_of_gemm:8.0f}{r.percent_of_copy:8.0f}{memory}{ratio}",
              flush=True)  # fmt: skip


def print_stacks(stacks: Sequence[StackMemory]) -> None:
    """Prints a table of memory, with percentages of eager's."""
    eager = {s.shape: s for s in stacks if s.provider == "eager"}
    print(f"{'shape':12}{'batch':>6}{'blocks':>8} {'provider':18}{'peak MiB':>10}{'kept MiB':>10}  % of eager's")
    for s in stacks:
        base = eager.get(s.shape)
        percent = f"{_percent(s.peak_bytes, base.peak_bytes)} {_percent(s.kept_bytes, base.kept_bytes)}" if base else ""
        memory = f"{s.peak_bytes / 2**20:10.0f}{s.kept_bytes / 2**20:10.0f}"
        print(f"{s.shape:12}{s.batch:6}{s.blocks:8} {s.provider:18}{memory}  {percent}", flush=True)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:5.1f}" if whole else "    -"
