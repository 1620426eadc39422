"""The cases of the kernel tests, on the interpreter (`interpreted/`) and on a device."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from scalevit.kernels import eager_mlp, fused_mlp, reference_mlp

NAMES = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
SAVES = ("fast", "lean", "recompute")


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
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [t for t in arguments if t is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.device, y.dtype))]


def check_against_fp64(case: Case, device: str = "cpu", dy: Tensor | None = None) -> list[Tensor]:
    """The project's criterion: error against fp64 below twice the error of eager torch in the same dtype."""
    arguments = make_arguments(case, device)
    truth = run(reference_mlp, arguments, case, dy)
    eager = run(eager_mlp, arguments, case, dy)
    fused = run(fused_mlp, arguments, case, dy, save=case.save, backend="triton")
    names = ["y", *(f"grad of {n}" for n, t in zip(NAMES, arguments, strict=True) if t is not None)]
    for name, t, e, f in zip(names, truth, eager, fused, strict=True):
        assert f.shape == e.shape, name
        assert f.dtype == e.dtype, name
        compare(name, f, e, t)
    return fused


def check_autocast(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The same criterion for fp32 arguments under autocast to `dtype`, and gradients of zero beyond the width.

    Here the products of the weight gradients come out in fp32, where eager's are rounded to `dtype` first.
    """
    arguments = make_arguments(case, device)
    truth = run(reference_mlp, arguments, case)
    with torch.autocast(device, dtype):
        eager = run(eager_mlp, arguments, case)
        fused = run(fused_mlp, arguments, case, save=case.save, backend="triton")
    assert fused[0].dtype == dtype
    for name, t, e, f in zip(("y", *NAMES), truth, eager, fused, strict=True):
        assert f.dtype == e.dtype, name
        compare(f"{name} or its gradient", f, e, t)
    if case.width:
        _, _, dw1, db1, dw2, _ = fused
        for tail in (dw1[case.width :], db1[case.width :], dw2[:, case.width :]):
            assert tail.numel()
            assert not tail.any()


def compare(name: str, fused: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Root-mean-square and largest error against twice eager's.

    The slack of 1e-6 (of the largest value) is the polynomial GELU's own error, and what a problem so small
    that eager is exact needs. The largest error has one step of the dtype besides: it is one element's
    rounding, and rounding the other way is not an error.
    """
    truth = truth.double()
    assert not torch.isnan(fused).any(), f"{name}: NaN"
    if truth.numel() == 0:
        return
    size = truth.abs().max().item()
    mine, theirs = ((t.double() - truth).abs() for t in (fused, eager))
    rms = [e.pow(2).mean().sqrt().item() for e in (mine, theirs)]
    # fp64 runs in another order than the reference, and "eager" is the reference there: 64 steps.
    slack = 64 * torch.finfo(torch.float64).eps if fused.dtype == torch.float64 else 1e-6
    assert rms[0] <= 2 * rms[1] + slack * max(size, 1), f"{name}: rms error {rms[0]:.2e}, eager {rms[1]:.2e}"
    step = torch.finfo(fused.dtype).eps * size
    limit = 2 * theirs.max().item() + step + slack * max(size, 1)
    assert mine.max().item() <= limit, f"{name}: largest error {mine.max():.2e}, eager {theirs.max():.2e}"
