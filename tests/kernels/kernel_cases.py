"""The cases of the kernel tests, on the interpreter (`interpreted/`) and on a device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from error_bounds import error_bounds
from scalevit.kernels import eager_mlp, fused_mlp, gated_mlp, mlp, reference_mlp
from scalevit.kernels.tuning.tables import KernelPlan

NAMES = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
SAVES = ("fast", "lean", "recompute")
# Number of elements from which the root mean square of the errors is compared: for fewer it varies too much by chance.
MANY = 1000
# By how much of the bound the root mean square of the errors may exceed twice eager's.
SLACK = 1 / 32


@contextmanager
def using_plan(plan: KernelPlan) -> Iterator[None]:
    """Runs every fused MLP of the block, plain or gated, with this plan, whatever the tables contain."""
    with (
        mock.patch.object(mlp, "find_plan", return_value=plan),
        mock.patch.object(gated_mlp, "find_plan", return_value=plan),
    ):
        yield


@dataclass(frozen=True)
class Case:
    """One MLP problem. rows: x's leading shape; layout: how x lies in memory; scale: multiplies fc1."""

    rows: tuple[int, ...] = (2, 37)
    d: int = 48
    h: int = 96
    d_out: int = 32
    width: int | None = None
    activation: str = "gelu"
    save: str = "fast"
    biases: tuple[bool, bool] = (True, True)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    scale: float = 1.0

    def __str__(self) -> str:
        parts = ["x".join(map(str, (*self.rows, self.d, self.h, self.d_out))), str(self.dtype)[6:], self.save]
        parts += [self.activation] if self.activation != "gelu" else []
        parts += [f"width{self.width}"] if self.width else []
        parts += [self.layout] if self.layout != "contiguous" else []
        parts += [f"bias{int(self.biases[0])}{int(self.biases[1])}"] if not all(self.biases) else []
        parts += [f"scale{self.scale:g}"] if self.scale != 1 else []
        return "-".join(parts)

    @property
    def options(self) -> dict:
        return {"width": self.width, "activation": self.activation}

    # What is tested, and against what; `gated_cases` has others.

    @property
    def names(self) -> tuple[str, ...]:
        return NAMES

    def arguments(self, device: str = "cpu", seed: int = 0) -> list[Tensor | None]:
        return make_arguments(self, device, seed)

    def fused(self, *arguments: Tensor | None, **options) -> Tensor:
        return fused_mlp(*arguments, **options)

    def eager(self, *arguments: Tensor | None, **options) -> Tensor:
        return eager_mlp(*arguments, **options)

    def reference(self, *arguments: Tensor | None, **options) -> Tensor:
        return reference_mlp(*arguments, **options)

    def bounds(self, arguments: list[Tensor | None], dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
        return error_bounds(arguments, dy, dtype=dtype, **self.options)

    def tails(self, gradients: list[Tensor]) -> list[Tensor]:
        """What lies beyond the width, of the gradients of all of the operator's parameters."""
        dw1, db1, dw2, _ = gradients
        return [dw1[self.width :], db1[self.width :], dw2[:, self.width :]]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CASES = [
    *(Case(dtype=d, save=s, activation=a) for d, s, a in itertools.product(DTYPES, SAVES, ("gelu", "gelu_tanh"))),
    *(Case(rows=(m,), dtype=torch.bfloat16, save=s) for m in (1, 127, 197) for s in SAVES),
    *(Case(rows=(3, 31), d=45, h=75, d_out=33, dtype=d, save=s) for d in DTYPES for s in SAVES),
    *(Case(d=1, h=1, d_out=1, dtype=d) for d in DTYPES),
    *(Case(d=40, h=72, d_out=24, dtype=torch.bfloat16, save=s) for s in SAVES),  # rows on 16 bytes, not 16 elements
    *(Case(width=w, dtype=d, save=s) for w in (16, 48, 96) for d in DTYPES[:2] for s in SAVES),
    *(
        Case(layout=layout, dtype=d, save="lean")
        for layout in ("channels_first", "padded", "unaligned", "expanded")
        for d in DTYPES[:2]
    ),
    *(Case(biases=b, save=s) for b in ((False, True), (True, False), (False, False)) for s in SAVES),
    *(Case(scale=s, dtype=d, activation=a) for s in (10.0, 1e4) for d in DTYPES[:2] for a in ("gelu", "gelu_tanh")),
]


def make_arguments(case: Case, device: str = "cpu", seed: int = 0) -> list[Tensor | None]:
    """x, fc1_weight, fc1_bias, fc2_weight, fc2_bias as leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return values.to(device, case.dtype).requires_grad_()

    x = lay_out(normal(*case.rows, case.d).detach(), case.layout).requires_grad_()
    return [
        x,
        normal(case.h, case.d, scale=case.scale * case.d**-0.5),
        normal(case.h, scale=case.scale) if case.biases[0] else None,
        normal(case.d_out, case.h, scale=case.h**-0.5),
        normal(case.d_out) if case.biases[1] else None,
    ]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout. Padding between them is NaN, which nothing may read."""
    *lead, d = x.shape
    if layout == "contiguous":
        return x
    if layout == "channels_first":  # as a convolution leaves patch embeddings: (B, D, N) in memory
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "padded":
        wide = x.new_full((*lead, d + 8), float("nan"))
        wide[..., :d] = x
        return wide[..., :d]
    if layout == "unaligned":  # rows start 1 element past a 16-byte boundary: no descriptor can read them
        wide = x.new_full((*lead, d + 3), float("nan"))
        wide[..., 1 : d + 1] = x
        return wide[..., 1 : d + 1]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    raise ValueError(layout)


def run(function, arguments: list[Tensor | None], case: Case, dy: Tensor | None = None, **options) -> list[Tensor]:
    """[y, and the gradients of the arguments that are not None]."""
    y = function(*arguments, **case.options, **options)
    dy = gradient_of(y) if dy is None else dy
    leaves = [t for t in arguments if t is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.device, y.dtype))]


def gradient_of(y: Tensor) -> Tensor:
    """The gradient that `run` gives to a result of y's shape, in fp64."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def check_against_fp64(case: Case, device: str = "cpu", dy: Tensor | None = None) -> list[Tensor]:
    """The project's criterion, see `compare`, for a fused MLP with arguments of the case's dtype."""
    arguments = case.arguments(device)
    eager = run(case.eager, arguments, case, dy)
    fused = run(case.fused, arguments, case, dy, save=case.save, backend="triton")
    compare(fused, eager, arguments, case, dy)
    return fused


def check_autocast(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The same criterion for fp32 arguments under autocast to `dtype`, and gradients of zero beyond the width.

    Here the products of the weight gradients come out in fp32, where eager's are rounded to `dtype` first.
    """
    arguments = case.arguments(device)
    with torch.autocast(device, dtype):
        eager = run(case.eager, arguments, case)
        fused = run(case.fused, arguments, case, save=case.save, backend="triton")
    assert fused[0].dtype == dtype
    compare(fused, eager, arguments, case)
    if case.width:
        for tail in case.tails(fused[2:]):
            assert tail.numel()
            assert not tail.any()


def compare(
    results: list[Tensor], eager: list[Tensor], arguments: list[Tensor | None], case: Case, dy: Tensor | None = None
) -> None:
    """Errors of y and of the gradients against fp64: each element's, and their root mean square.

    Each element must be within its own bound, which follows from its conditioning (see `error_bounds`) and holds in any
    order of summation. The bounds are for the worst case; so of many elements the errors, in units of their bounds, may
    also have at most twice eager's root mean square. That depends on the order of summation in fp32 only, where it is
    about 0.01 and the slack decides.
    """
    dtype = results[0].dtype
    dy = (gradient_of(results[0]) if dy is None else dy).to(results[0].device, dtype)
    truth = run(case.reference, arguments, case, dy)
    bounds = case.bounds(arguments, dy, dtype)
    names = ["y", *(f"grad of {n}" for n, t in zip(case.names, arguments, strict=True) if t is not None)]
    for name, mine, theirs, exact, bound in zip(names, results, eager, truth, bounds, strict=True):
        assert mine.shape == theirs.shape == bound.shape, name
        assert mine.dtype == theirs.dtype, name
        assert not torch.isnan(mine).any(), f"{name}: NaN"
        if exact.numel() == 0:
            continue
        errors = [(t.double() - exact.double()).abs() for t in (mine, theirs)]
        limit = bound
        if bound.is_cuda:
            # The libraries there may round parts of a sum to the dtype, which no bound on fp32 sums covers.
            limit = torch.where(bound > 0, bound.clamp(min=2 * errors[1].max().item()), bound)
        worst = (errors[0] - limit).argmax()
        assert (errors[0] <= limit).all(), (
            f"{name}: error {errors[0].flatten()[worst]:.2e} of a value {exact.flatten()[worst]:.2e}, "
            f"bound {limit.flatten()[worst]:.2e}, eager {errors[1].flatten()[worst]:.2e}"
        )
        if exact.numel() >= MANY:
            units = bound.clamp(min=torch.finfo(torch.float64).tiny)
            rms = [(e / units).square().mean().sqrt().item() for e in errors]
            assert rms[0] <= 2 * rms[1] + SLACK, f"{name}: rms error {rms[0]:.3f} of the bound, eager {rms[1]:.3f}"


def kept_bytes(function, arguments, **options) -> int:
    """What one call keeps for its backward, beside its result and its arguments."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = function(*arguments, **options)
    return torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
