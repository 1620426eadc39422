"""Benchmarks of the fused MLP against what torch offers.

    python -m scalevit.kernels.bench [--shapes vit_b vit_b_half ...] [--batches 256] [--output FOLDER]

Each case is a shape, a batch, a pass (full, forward, backward, inference) and a provider, with weights in the
dtype computed in; ViT-B's shapes also with fp32 weights under autocast, as the engines train. max-autotune
compiles for minutes, so it comes after everything else. Inputs are random (zeros run faster) and rotated past the
L2 cache; times are p20 / p50 / p80 of single calls; "eager_again" is eager at the end of each round: how far it
is from eager is what drifted meanwhile. Results go to bench.csv, bench.json (with device, versions, date, command
and the memory of a stack of blocks), speedup.png and roofline.png, as soon as they are there. Without a GPU it
says so and prints the ahead-of-time resource table instead.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
ENGINE_SHAPES = ("vit_b", "vit_b_half")  # also measured under autocast, and as a stack of blocks
BLOCKS = 12  # of ViT-B
BATCHES = (32, 64, 128, 256, 512)
PASSES = ("full", "forward", "backward", "inference")
# Matrix products of 2 * M * D * H operations in each pass.
PRODUCTS = {"forward": 2, "backward": 4, "full": 6, "inference": 2}
SLOWEST = "max-autotune-no-cudagraphs"
FUSED = ("fused_fast", "fused_lean", "fused_recompute")
PROVIDERS = ("eager", "compile", "cublaslt_tanh", *FUSED, SLOWEST)


@dataclass(frozen=True)
class Result:
    """One line of the CSV.

    autocast: whether x and the weights are fp32 and autocast narrows them. p20, p50, p80: microseconds.
    percent_of_gemm, percent_of_copy: of the measured ceilings, by operations, and by the bytes of every product's
    operands and result, each moved once. peak_bytes: memory the call adds at its peak; of one MLP it is about the
    same for all, since its backward holds buffers of that size anyway. kept_bytes: what the call leaves for a
    backward, beside its arguments and results; this is what adds up over blocks (see `Stack`).
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
class Stack:
    """Memory of `blocks` residual MLPs in a row, x + mlp(x), in bytes: at the peak of forward + backward, and kept
    between the two. Both hold each block's input; the peak holds the weights' gradients too."""

    shape: str
    d: int
    h: int
    batch: int
    blocks: int
    provider: str
    peak_bytes: int
    kept_bytes: int


def _tanh_epilogue(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    hidden = torch._addmm_activation(b1, x, w1.T, use_gelu=True)  # cuBLASLt's epilogue, tanh form
    return torch.nn.functional.linear(hidden, w2, b2)


def providers(device: torch.device, names: Sequence[str] | None = None) -> dict[str, Callable[..., Tensor]]:
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
        SLOWEST: torch.compile(eager_mlp, mode="max-autotune-no-cudagraphs"),
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


def make_inputs(
    m: int, d: int, h: int, copies: int, device: torch.device, dtype: torch.dtype, autocast: bool = False
) -> list[list[Tensor]]:
    """[x, w1, b1, w2, b2, dy], `copies` times; weights alike in all, as in training. All but dy in fp32 for autocast,
    as a LayerNorm there leaves x."""
    leaves = torch.float32 if autocast else dtype

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(leaves).requires_grad_()

    weights = [normal(h, d, scale=d**-0.5), normal(h), normal(d, h, scale=h**-0.5), normal(d)]
    return [[normal(m, d), *weights, normal(m, d).detach().to(dtype)] for _ in range(copies)]


def under_autocast(mlp: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The MLP with autocast around its forward, as the engines call it."""

    def call(*arguments: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return mlp(*arguments)

    return call


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
    shape: str, d: int, h: int, batch: int, mlps: Mapping[str, Callable[..., Tensor]], ceilings: Ceilings,
    device: torch.device, dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS, seconds: float = 0.3,
    passes: Sequence[str] = PASSES, autocast: bool = False,
) -> Iterator[Result]:  # fmt: skip
    """Every pass of every provider at one shape and batch, each as soon as it is measured; then eager again."""
    m = batch * tokens
    inputs = make_inputs(m, d, h, copies_past_cache(m * d * dtype.itemsize, device), device, dtype, autocast)
    for what in passes:
        for name, mlp in {**mlps, "eager_again": eager_mlp}.items():
            if name == "cublaslt_tanh" and what != "inference":
                continue
            calls = calls_for(what, under_autocast(mlp, device, dtype) if autocast else mlp, inputs)
            timing: Timing = time_calls(calls, device, seconds=seconds)
            tflops = PRODUCTS[what] * 2 * m * d * h / timing.p50 * 1e-6
            moved = PRODUCTS[what] * (m * d + m * h + d * h) * dtype.itemsize / timing.p50 * 1e6
            peak, kept = memory_of(calls[0], device)
            yield Result(
                shape, d, h, batch, autocast, what, name, timing.p20, timing.p50, timing.p80, tflops,
                100 * tflops / ceilings.gemm_tflops, 100 * moved / ceilings.copy_bytes_per_second, peak, kept,
            )  # fmt: skip
            del calls


def measure_stack(
    shape: str, d: int, h: int, batch: int, mlps: Mapping[str, Callable[..., Tensor]], device: torch.device,
    dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS, blocks: int = BLOCKS,
) -> Iterator[Stack]:  # fmt: skip
    """The memory of a stack of blocks, each with weights of its own."""
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
        full()  # compiles, and allocates what libraries keep
        peak, _ = memory_of(full, device)
        _, kept = memory_of(partial(forward, mlp), device)
        yield Stack(shape, d, h, batch, blocks, name, peak, kept)


def environment(device: torch.device, ceilings: Ceilings, command: str) -> dict[str, object]:
    """Where the numbers come from; without it they mean nothing."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "device": name, "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.datetime.now().isoformat(timespec="seconds"), "command": command,
        "gemm_ceiling_tflops": ceilings.gemm_tflops,
        "copy_ceiling_bytes_per_second": ceilings.copy_bytes_per_second,
    }  # fmt: skip


def drift(results: Sequence[Result]) -> float:
    """The largest relative change of eager's median from the beginning of a case to the end of a round."""
    eager = {_case(r): r.p50 for r in results if r.provider == "eager"}
    again = [(r.p50, eager.get(_case(r))) for r in results if r.provider == "eager_again"]
    return max((abs(later / first - 1) for later, first in again if first), default=0.0)


def _case(r: Result) -> tuple[object, ...]:
    return r.shape, r.batch, r.autocast, r.what


def write_results(
    folder: Path, results: Sequence[Result], about: dict[str, object], stacks: Sequence[Stack] = ()
) -> None:
    """bench.csv and bench.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(r) for r in results]
    with open(folder / "bench.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    content = {"about": about, "drift": drift(results), "results": rows, "stacks": [asdict(s) for s in stacks]}
    (folder / "bench.json").write_text(json.dumps(content, indent=1) + "\n")


def write_plots(folder: Path, results: list[Result], about: dict[str, object]) -> None:
    """speedup.png and roofline.png, where matplotlib is installed."""
    try:
        from .bench_plots import plot_roofline, plot_speedup
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    plot_speedup(results, str(about["device"]), folder / "speedup.png")
    plot_roofline(results, about, folder / "roofline.png")


def print_results(results: Sequence[Result], before: Sequence[Result] = ()) -> None:
    """A table with each provider's speed-up over eager, which may be among the results `before`."""
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


def print_stacks(stacks: Sequence[Stack]) -> None:
    """A table of memory, beside eager's."""
    eager = {s.shape: s for s in stacks if s.provider == "eager"}
    print(f"{'shape':12}{'batch':>6}{'blocks':>8} {'provider':18}{'peak MiB':>10}{'kept MiB':>10}  % of eager's")
    for s in stacks:
        base = eager.get(s.shape)
        percent = f"{_percent(s.peak_bytes, base.peak_bytes)} {_percent(s.kept_bytes, base.kept_bytes)}" if base else ""
        memory = f"{s.peak_bytes / 2**20:10.0f}{s.kept_bytes / 2**20:10.0f}"
        print(f"{s.shape:12}{s.batch:6}{s.blocks:8} {s.provider:18}{memory}  {percent}", flush=True)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:5.1f}" if whole else "    -"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options, for this module's command and for any that embeds it."""
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="images")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
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
    stacks: list[Stack] = []
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
                torch._dynamo.reset()  # each case compiles for itself, as it would in its own run
                first = len(results)
                for result in measure_case(
                    shape, *SHAPES[shape], batch, providers(device, names), ceilings, device, dtype,
                    seconds=arguments.seconds, passes=arguments.passes, autocast=autocast,
                ):  # fmt: skip
                    results.append(result)
                    write_results(arguments.output, results, about, stacks)  # a run that is stopped leaves what it has
                print_results(results[first:], before=results[:first])
                write_plots(arguments.output, results, about)
    print(f"eager drifted by at most {100 * drift(results):.1f} %; wrote {arguments.output}")
    return 0


def rounds(names: Sequence[str], *, autocast: bool = True) -> list[tuple[list[str], bool]]:
    """(providers, whether under autocast) of each pass over the shapes, the one that compiles for minutes last."""
    quick = [n for n in names if n != SLOWEST]
    engines = [n for n in quick if autocast and n != "cublaslt_tanh"]  # that one has no backward
    slow = [n for n in names if n == SLOWEST]
    return [r for r in ((quick, False), (engines, True), (slow, False)) if r[0]]


def main(argv: list[str] | None = None) -> int:
    summary = "Benchmark the fused MLP."
    parser = argparse.ArgumentParser(prog="python -m scalevit.kernels.bench", description=summary)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
