"""Benchmarks of the fused MLPs, plain and gated, against what torch offers.

    python -m scalevit.kernels.bench [--shapes vit_b vit_b_half ...] [--batches 256] [--output FOLDER]

A case is a shape, a batch, a pass (full, forward, backward, inference) and a provider, with weights in the dtype of the
computation; ViT-B's shapes are also measured with fp32 weights under autocast, as the engines train. The shapes of
gated MLPs are SwiGLU with gate and value in one packed weight. max-autotune
compiles for minutes and therefore runs last. Inputs are random (zeros run faster) and rotated so that none is in the L2
cache when it is used; times are p20 / p50 / p80 of single calls. "eager_again" is eager measured again after the other
providers; its difference from eager shows how much the device drifted. Results are written after each measurement:
bench.csv, bench.json (with device, versions, date, command and the memory of a stack of blocks), speedup.png and
roofline.png. Without a GPU the benchmark prints the ahead-of-time compile report instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._functorch import config as functorch

from scalevit.kernels import compile_report
from scalevit.kernels.bench_plots import PLOTS_MISSING, can_plot, write_plots
from scalevit.kernels.bench_results import (
    TOKENS,
    BenchRow,
    StackMemory,
    drift,
    print_results,
    print_stacks,
    write_results,
)
from scalevit.kernels.gated_mlp import fused_packed_gated_mlp
from scalevit.kernels.mlp import fused_mlp
from scalevit.kernels.reference import eager_mlp, eager_packed_gated_mlp
from scalevit.kernels.timing import Timing, cold_cache_copies, environment, time_calls

# name -> (D, H). H of a gated MLP is the width of gate and of value; these are Sapiens2-B's, AIMv2-L's and DINOv2-g's.
GATED_SHAPES = {"swiglu_b": (768, 3072), "swiglu_l": (1024, 2816), "swiglu_g": (1536, 4096)}
# vit_b_half is the paper's narrowed MLP.
SHAPES = {
    "vit_b": (768, 3072), "vit_b_half": (768, 1536), "vit_s": (384, 1536), "vit_l": (1024, 4096),
    "vit_h": (1280, 5120), **GATED_SHAPES,
}  # fmt: skip
ENGINE_SHAPES = ("vit_b", "vit_b_half")  # also measured under autocast, and as a stack of blocks
BLOCKS = 12  # of ViT-B
BATCHES = (32, 64, 128, 256, 512)
PASSES = ("full", "forward", "backward", "inference")
# Matrix products of 2 * M * D * H operations in each pass; gated MLPs have half as many again.
PRODUCTS_PER_PASS = {"forward": 2, "backward": 4, "full": 6, "inference": 2}
SLOWEST = "max-autotune-no-cudagraphs"
FUSED = ("fused_fast", "fused_lean", "fused_recompute")
PROVIDERS = ("eager", "compile", "cublaslt_tanh", *FUSED, SLOWEST)


def _tanh_epilogue(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    hidden = torch._addmm_activation(b1, x, w1.T, use_gelu=True)  # cuBLASLt's epilogue, tanh form
    return torch.nn.functional.linear(hidden, w2, b2)


def providers(
    device: torch.device, names: Sequence[str] | None = None, *, gated: bool = False
) -> dict[str, Callable[..., Tensor]]:
    """name -> MLP of (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias), which are packed if it is gated.

    "cublaslt_tanh" computes the tanh form and has no backward: it is measured in inference only, of plain MLPs.
    """
    eager: Callable[..., Tensor] = eager_packed_gated_mlp if gated else eager_mlp
    operator: Callable[..., Tensor] = fused_packed_gated_mlp if gated else fused_mlp

    def fused(save: str) -> Callable[..., Tensor]:
        return lambda *a: operator(*a, save=save, backend="triton")

    everything: dict[str, Callable[..., Tensor]] = {
        "eager": eager,
        "compile": torch.compile(eager),
        "cublaslt_tanh": _tanh_epilogue,
        "fused_fast": fused("fast"),
        "fused_lean": fused("lean"),
        "fused_recompute": fused("recompute"),
        SLOWEST: torch.compile(eager, mode="max-autotune-no-cudagraphs"),
    }
    if gated or device.type == "cpu":
        del everything["cublaslt_tanh"]
    return {name: f for name, f in everything.items() if names is None or name in names}


def calls_for(what: str, mlp: Callable[..., Tensor], inputs: list[list[Tensor]]) -> list[Callable[[], object]]:
    """One call for each copy of the inputs [x, w1, b1, w2, b2, dy]."""

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


def make_inputs(
    m: int, d: int, h: int, copies: int, device: torch.device, dtype: torch.dtype, autocast: bool = False,
    gated: bool = False,
) -> list[list[Tensor]]:  # fmt: skip
    """[x, w1, b1, w2, b2, dy], `copies` times, with the same weights in all, as in training.

    For autocast all but dy are fp32, which is the dtype of a LayerNorm's output there. For a gated MLP w1 and b1 are
    packed.
    """
    leaves = torch.float32 if autocast else dtype

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(leaves).requires_grad_()

    rows = 2 * h if gated else h
    weights = [normal(rows, d, scale=d**-0.5), normal(rows), normal(d, h, scale=h**-0.5), normal(d)]
    return [[normal(m, d), *weights, normal(m, d).detach().to(dtype)] for _ in range(copies)]


def under_autocast(mlp: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The MLP with autocast around its forward, as the engines call it."""

    def call(*arguments: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return mlp(*arguments)

    return call


def memory_of(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes that one call adds at its peak, and bytes that it keeps besides its results (a forward's activations)."""
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
    """What the device reaches: gemm in TFLOP/s (8192 cubed), copy in bytes per second (1 GiB)."""

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
    shape: str, d: int, h: int, batch: int, mlps: Mapping[str, Callable[..., Tensor]], ceilings: Ceilings,
    device: torch.device, dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS, seconds: float = 0.3,
    passes: Sequence[str] = PASSES, autocast: bool = False,
) -> Iterator[BenchRow]:  # fmt: skip
    """Yields every pass of every provider at one shape and batch, then eager again."""
    m, gated = batch * tokens, shape in GATED_SHAPES
    inputs = make_inputs(m, d, h, cold_cache_copies(m * d * dtype.itemsize, device), device, dtype, autocast, gated)
    for what in passes:
        for name, mlp in {**mlps, "eager_again": eager_packed_gated_mlp if gated else eager_mlp}.items():
            if name == "cublaslt_tanh" and what != "inference":
                continue
            calls = calls_for(what, under_autocast(mlp, device, dtype) if autocast else mlp, inputs)
            timing: Timing = time_calls(calls, device, seconds=seconds)
            count = PRODUCTS_PER_PASS[what] * (1.5 if gated else 1)
            tflops = count * 2 * m * d * h / timing.p50 * 1e-6
            moved = count * (m * d + m * h + d * h) * dtype.itemsize / timing.p50 * 1e6
            peak, kept = memory_of(calls[0], device)
            yield BenchRow(
                shape, d, h, batch, autocast, what, name, timing.p20, timing.p50, timing.p80, tflops,
                100 * tflops / ceilings.gemm_tflops, 100 * moved / ceilings.copy_bytes_per_second, peak, kept,
            )  # fmt: skip
            del calls


def measure_stack(
    shape: str, d: int, h: int, batch: int, mlps: Mapping[str, Callable[..., Tensor]], device: torch.device,
    dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS, blocks: int = BLOCKS,
) -> Iterator[StackMemory]:  # fmt: skip
    """Yields the memory of a stack of blocks, each with its own weights."""
    m = batch * tokens
    x, *_, dy = make_inputs(m, d, h, 1, device, dtype)[0]
    weights = [make_inputs(1, d, h, 1, device, dtype)[0][1:5] for _ in range(blocks)]
    leaves = [x, *(w for own in weights for w in own)]

    def forward(mlp: Callable[..., Tensor]) -> Tensor:
        y = x
        for own in weights:
            y = y + mlp(y, *own)
        return y

    for name, mlp in mlps.items():
        full = partial(lambda mlp: torch.autograd.grad(forward(mlp), leaves, dy), mlp)
        full()  # compiles, and allocates the workspaces of the libraries
        peak, _ = memory_of(full, device)
        _, kept = memory_of(partial(forward, mlp), device)
        yield StackMemory(shape, d, h, batch, blocks, name, peak, kept)


# For the help of `scalevit bench kernels`.
EXAMPLES = """\
  scalevit bench kernels --shapes vit_b swiglu_b --batches 256
  scalevit bench kernels --providers eager compile fused_fast --passes full --output runs/mlp"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options to a parser."""
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="images")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.3, help="measuring time per result")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-kernels"), help="folder for the results")


def run(arguments: argparse.Namespace) -> int:
    """Measures and writes; returns the exit status."""
    if not torch.cuda.is_available():
        print("No GPU on this machine, so nothing is measured. Ahead-of-time compile report of the kernels:\n")
        return compile_report.main([])
    if not can_plot():
        print(PLOTS_MISSING)
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, arguments.dtype)
    # The backward is timed over graphs that are retained, whose buffers torch.compile would otherwise reuse.
    functorch.donated_buffer = False
    ceilings = measure_ceilings(device, dtype)
    about = environment(device, " ".join(sys.argv)) | {
        "gemm_ceiling_tflops": ceilings.gemm_tflops,
        "copy_ceiling_bytes_per_second": ceilings.copy_bytes_per_second,
    }
    ceiling = f"{ceilings.gemm_tflops:.0f} TFLOP/s, {ceilings.copy_bytes_per_second * 1e-12:.2f} TB/s"
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}; measured ceilings {ceiling}")
    results: list[BenchRow] = []
    stacks: list[StackMemory] = []
    small = [n for n in ("eager", *FUSED) if n in arguments.providers]
    batch = min(arguments.batches, key=lambda b: abs(b - 256))
    for shape in (s for s in arguments.shapes if s in ENGINE_SHAPES):
        stacks += measure_stack(shape, *SHAPES[shape], batch, providers(device, small), device, dtype)
    if stacks:
        print_stacks(stacks)
    for names, autocast in rounds(arguments.providers, autocast=dtype != torch.float32):
        for shape in arguments.shapes:
            if autocast and shape not in ENGINE_SHAPES:
                continue
            for batch in arguments.batches:
                torch._dynamo.reset()  # each case is compiled separately, as in a run of its own
                first = len(results)
                for result in measure_case(
                    shape, *SHAPES[shape], batch, providers(device, names, gated=shape in GATED_SHAPES), ceilings,
                    device, dtype, seconds=arguments.seconds, passes=arguments.passes, autocast=autocast,
                ):  # fmt: skip
                    results.append(result)
                    write_results(arguments.output, results, about, stacks)  # so that a stopped run loses little
                print_results(results[first:], before=results[:first])
                if can_plot():
                    write_plots(arguments.output, results, about)
    print(f"eager drifted by at most {100 * drift(results):.1f} %; wrote {arguments.output}")
    return 0


def rounds(names: Sequence[str], *, autocast: bool = True) -> list[tuple[list[str], bool]]:
    """(providers, whether under autocast) of each round over the shapes, the one that compiles for minutes last."""
    quick = [n for n in names if n != SLOWEST]
    engines = [n for n in quick if autocast and n != "cublaslt_tanh"]  # it has no backward
    slow = [n for n in names if n == SLOWEST]
    return [r for r in ((quick, False), (engines, True), (slow, False)) if r[0]]


def main(argv: list[str] | None = None) -> int:
    summary = "Benchmark the fused MLPs, plain and gated."
    parser = argparse.ArgumentParser(prog="python -m scalevit.kernels.bench", description=summary)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
