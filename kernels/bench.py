"""Benchmarks of the fused MLP against what torch offers.

    python -m scalevit.kernels.bench [--shapes vit_b vit_b_half ...] [--batches 256] [--output FOLDER]

Each case is a shape, a batch, a pass (forward, backward, full, inference) and a provider. Inputs are random
(zeros run faster) and rotated past the L2 cache; times are p20 / p50 / p80 of single calls. Results go to
bench.csv, bench.json (with device, versions, date and command), speedup.png and roofline.png. Without a GPU
it says so and prints the ahead-of-time resource table instead.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch._functorch import config as functorch

from .mlp import fused_mlp
from .reference import eager_mlp
from .timing import Timing, copies_past_cache, time_calls

TOKENS = 197  # to an image: 14 x 14 patches and the class token
# name -> (D, H). vit_b_half is the paper's narrowed MLP.
SHAPES = {
    "vit_b": (768, 3072), "vit_b_half": (768, 1536), "vit_s": (384, 1536), "vit_l": (1024, 4096),
    "vit_h": (1280, 5120),
}  # fmt: skip
BATCHES = (32, 64, 128, 256, 512)
PASSES = ("forward", "backward", "full", "inference")
# Matrix products of 2 * M * D * H operations in each pass.
PRODUCTS = {"forward": 2, "backward": 4, "full": 6, "inference": 2}


@dataclass(frozen=True)
class Result:
    """One line of the CSV. Times in microseconds; peak_bytes: memory the call adds at its peak; kept_bytes: what it
    leaves for the backward beside its results."""

    shape: str
    d: int
    h: int
    batch: int
    what: str
    provider: str
    p20: float
    p50: float
    p80: float
    tflops: float
    percent_of_gemm: float
    peak_bytes: int
    kept_bytes: int


def _tanh_epilogue(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    hidden = torch._addmm_activation(b1, x, w1.T, use_gelu=True)  # cuBLASLt's epilogue, tanh form
    return torch.nn.functional.linear(hidden, w2, b2)


def providers(device: torch.device, names: list[str] | None = None) -> dict[str, Callable[..., Tensor]]:
    """name -> MLP. "cublaslt_tanh" computes the tanh form and has no backward: it joins inference alone."""

    def fused(save: str) -> Callable[..., Tensor]:
        return lambda *a: fused_mlp(*a, save=save, backend="triton")

    everything: dict[str, Callable[..., Tensor]] = {
        "eager": eager_mlp,
        "compile": torch.compile(eager_mlp),
        "cublaslt_tanh": _tanh_epilogue,
        "fused_fast": fused("fast"),
        "fused_lean": fused("lean"),
        "fused_recompute": fused("recompute"),
        # Last, because it compiles for minutes: what is before it is written by then.
        "max_autotune": torch.compile(eager_mlp, mode="max-autotune-no-cudagraphs"),
    }
    if device.type == "cpu":
        del everything["cublaslt_tanh"]
    return {name: f for name, f in everything.items() if names is None or name in names}


def calls_for(what: str, mlp: Callable[..., Tensor], inputs: list[list[Tensor]]) -> list[Callable[[], object]]:
    """One call for each copy of the inputs: [x, w1, b1, w2, b2, dy]."""

    def forward(args: list[Tensor]) -> Tensor:
        return mlp(*args[:5])

    def inference(args: list[Tensor]) -> Tensor:
        with torch.inference_mode():
            return mlp(*args[:5])

    def full(args: list[Tensor]) -> object:
        return torch.autograd.grad(mlp(*args[:5]), args[:5], args[5])

    if what == "backward":
        graphs = [(forward(args), args) for args in inputs]
        return [partial(torch.autograd.grad, y, a[:5], a[5], retain_graph=True) for y, a in graphs]
    function = {"forward": forward, "inference": inference, "full": full}[what]
    return [partial(function, args) for args in inputs]


def make_inputs(m: int, d: int, h: int, copies: int, device: torch.device, dtype: torch.dtype) -> list[list[Tensor]]:
    """[x, w1, b1, w2, b2, dy], `copies` times; weights alike in all, as in training."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    weights = [normal(h, d, scale=d**-0.5), normal(h), normal(d, h, scale=h**-0.5), normal(d)]
    return [[normal(m, d), *weights, normal(m, d).detach()] for _ in range(copies)]


def memory_of(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes that one call adds at its peak, and that it keeps beside its results: the activations of a forward."""
    if device.type == "cpu":
        return 0, 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = call()
    torch.cuda.synchronize(device)
    tensors = results if isinstance(results, tuple) else (results,)
    kept = torch.cuda.memory_allocated(device) - before
    kept -= sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor))
    return torch.cuda.max_memory_allocated(device) - before, kept


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches here: gemm in TFLOP/s (8192 cubed), copy in bytes per second (1 GiB)."""

    gemm_tflops: float
    copy_bytes_per_second: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, size: int = 8192, copied: int = 2**30) -> Ceilings:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    gemm = time_calls([lambda: a @ b], device, seconds=1.0).p50
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device, seconds=1.0).p50
    return Ceilings(2 * size**3 / gemm * 1e-6, 2 * copied / copy * 1e6)


def measure_case(
    shape: str, d: int, h: int, batch: int, mlps: dict[str, Callable[..., Tensor]], ceilings: Ceilings,
    device: torch.device, dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS, seconds: float = 0.3,
) -> Iterator[Result]:  # fmt: skip
    """Every pass of every provider at one shape and batch, each as soon as it is measured."""
    m = batch * tokens
    inputs = make_inputs(m, d, h, copies_past_cache(m * d * dtype.itemsize, device), device, dtype)
    for name, mlp in mlps.items():
        for what in PASSES if name != "cublaslt_tanh" else ("inference",):
            calls = calls_for(what, mlp, inputs)
            timing: Timing = time_calls(calls, device, seconds=seconds)
            tflops = PRODUCTS[what] * 2 * m * d * h / timing.p50 * 1e-6
            peak, kept = memory_of(calls[0], device)
            yield Result(
                shape, d, h, batch, what, name, timing.p20, timing.p50, timing.p80, tflops,
                100 * tflops / ceilings.gemm_tflops, peak, kept,
            )  # fmt: skip
            del calls


def environment(device: torch.device, ceilings: Ceilings, command: str) -> dict[str, object]:
    """Where the numbers come from; without it they mean nothing."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "device": name, "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.datetime.now().isoformat(timespec="seconds"), "command": command,
        "gemm_ceiling_tflops": ceilings.gemm_tflops,
        "copy_ceiling_bytes_per_second": ceilings.copy_bytes_per_second,
    }  # fmt: skip


def write_results(folder: Path, results: list[Result], about: dict[str, object]) -> None:
    """bench.csv and bench.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(r) for r in results]
    with open(folder / "bench.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    (folder / "bench.json").write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")


def write_plots(folder: Path, results: list[Result], about: dict[str, object]) -> None:
    """speedup.png and roofline.png, where matplotlib is installed."""
    try:
        from .bench_plots import plot_roofline, plot_speedup
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    plot_speedup(results, str(about["device"]), folder / "speedup.png")
    plot_roofline(results, about, folder / "roofline.png")


def print_results(results: list[Result]) -> None:
    """A table with each provider's speed-up over eager."""
    eager = {(r.shape, r.batch, r.what): r.p50 for r in results if r.provider == "eager"}
    print(f"{'shape':12}{'batch':>6} {'pass':10}{'provider':16}{'p20':>9}{'p50':>9}{'p80':>9}  us"
          f"{'TFLOP/s':>9}{'% GEMM':>8}{'peak MiB':>10}{'kept MiB':>10}{'x eager':>9}")  # fmt: skip
    for r in results:
        base = eager.get((r.shape, r.batch, r.what))
        ratio = f"{base / r.p50:9.2f}" if base else f"{'':9}"
        memory = f"{r.peak_bytes / 2**20:10.0f}{r.kept_bytes / 2**20:10.0f}"
        print(f"{r.shape:12}{r.batch:6} {r.what:10}{r.provider:16}{r.p20:9.0f}{r.p50:9.0f}{r.p80:9.0f}    "
              f"{r.tflops:9.0f}{r.percent_of_gemm:8.0f}{memory}{ratio}")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options, for this module's command and for any that embeds it."""
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="images")
    parser.add_argument("--providers", nargs="+", help="those of this list: eager, compile, max_autotune, "
                        "cublaslt_tanh, fused_fast, fused_lean, fused_recompute")  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.3, help="of measuring for each number")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-kernels"), help="folder for the results")


def run(arguments: argparse.Namespace) -> int:
    """Measures and writes; returns the exit status."""
    if not torch.cuda.is_available():
        from . import resources

        print("No GPU here: nothing is measured. What the kernels need, compiled ahead of time:\n")
        return resources.main([])
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, arguments.dtype)
    # The backward alone is timed over graphs that are kept; torch.compile would hand their buffers on.
    functorch.donated_buffer = False
    ceilings = measure_ceilings(device, dtype)
    about = environment(device, ceilings, " ".join(sys.argv))
    ceiling = f"{ceilings.gemm_tflops:.0f} TFLOP/s, {ceilings.copy_bytes_per_second * 1e-12:.2f} TB/s"
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}; measured ceilings {ceiling}")
    results: list[Result] = []
    for shape in arguments.shapes:
        for batch in arguments.batches:
            torch._dynamo.reset()  # each shape compiles for itself, as it would in its own run
            mlps = providers(device, arguments.providers)
            for result in measure_case(
                shape, *SHAPES[shape], batch, mlps, ceilings, device, dtype, seconds=arguments.seconds
            ):
                results.append(result)
                write_results(arguments.output, results, about)  # a run that is stopped leaves what it has
    print_results(results)
    write_plots(arguments.output, results, about)
    print(f"wrote {arguments.output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    summary = "Benchmark the fused MLP."
    parser = argparse.ArgumentParser(prog="python -m scalevit.kernels.bench", description=summary)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
