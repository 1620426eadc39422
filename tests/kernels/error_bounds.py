"""How far a correct MLP may be from fp64, element by element, on any machine and in any order of summation.

A running error analysis in fp64: every value has a bound on its error, and each operation adds what it may round. So
an element that is badly conditioned (a pre-activation near 0 after terms of 1e4 cancelled, where gelu' is steep) may
be as wrong as its terms make it, and all others only by their own few roundings. Source of the bound on sums: Higham
and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41 (2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scalevit.kernels.reference import APPROXIMATE

# Independent errors add up to less than this many times the root of the sum of their bounds' squares. Rounding errors
# are spread evenly up to their bounds, so that this is 7 of their standard deviations.
DEVIATIONS = 3
# Both GELUs of the kernels (erf in fp32, the polynomial for bf16 and fp16) and their derivatives, twice what
# `test_gelu_kernels` allows for the polynomial.
GELU_ERROR = 2.4e-6
# Between these gelu, gelu', and their tanh forms are monotone.
TURNING_POINTS = (-1.4243, -1.4142, -0.7525, -0.7518, 1.4142, 1.4243)
# Sums run in fp32, in every dtype.
UNIT = torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True)
class Estimate:
    """The exact value in fp64, and a bound on the error of a computed one; both of one shape."""

    value: Tensor
    error: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> Estimate:
        return cls(value.double(), torch.zeros_like(value, dtype=torch.float64))

    @property
    def largest(self) -> Tensor:
        return self.value.abs() + self.error

    @property
    def T(self) -> Estimate:
        return Estimate(self.value.T, self.error.T)

    def stored(self, dtype: torch.dtype) -> Estimate:
        """Rounded to `dtype`; below its smallest normal number the steps stay as they are there."""
        kind = torch.finfo(dtype)
        return Estimate(self.value, self.error + kind.eps / 2 * self.largest.clamp(min=kind.smallest_normal))

    def __add__(self, other: Estimate) -> Estimate:
        value, error = self.value + other.value, self.error + other.error
        return Estimate(value, error + UNIT * (self.largest + other.largest))

    def __mul__(self, other: Estimate) -> Estimate:
        value = self.value * other.value
        error = self.error * other.largest + self.largest * other.error - self.error * other.error
        return Estimate(value, error + UNIT * (value.abs() + error))

    def __matmul__(self, other: Estimate) -> Estimate:
        error = _add_up(self.error, other.largest) + _add_up(self.largest, other.error)
        count = self.value.shape[1]
        # Each of the `count` roundings is of a partial sum, which the terms' absolute values bound in any order.
        roundings = min(count, DEVIATIONS * math.sqrt(count)) * UNIT
        return Estimate(self.value @ other.value, error + roundings * (self.largest @ other.largest))

    def sum(self) -> Estimate:
        """Over the rows: (M, N) -> (N,)."""
        ones = torch.ones(1, self.value.shape[0], dtype=torch.float64, device=self.value.device)
        product = Estimate.exact(ones) @ self
        return Estimate(product.value[0], product.error[0])


def _add_up(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of two bounds: linear for a few errors, statistical for many."""
    return torch.minimum(left @ right, DEVIATIONS * (left.square() @ right.square()).sqrt())


def _apply(function, x: Estimate) -> Estimate:
    """Of a function that is monotone between `TURNING_POINTS`, so that its largest change lies at one of these."""
    low, high = x.value - x.error, x.value + x.error
    value = function(x.value)
    inside = (torch.clamp(torch.full_like(low, point), low, high) for point in TURNING_POINTS)
    change = torch.stack([(function(at) - value).abs() for at in (low, high, *inside)]).amax(0)
    return Estimate(value, change + GELU_ERROR)


def error_bounds(
    arguments: list[Tensor | None], dy: Tensor, *, width: int | None, activation: str, dtype: torch.dtype
) -> list[Tensor]:
    """Bounds of y and of the gradients of the arguments that are not None, for an MLP computed in `dtype`.

    They allow every rounding that eager or a save mode of fused_mlp makes: arguments of another dtype (autocast); pre,
    post, slope, dpost and dpre when they are stored; each result once. Sums are in fp32. dy is taken as it is.
    """

    def read(t: Tensor) -> Estimate:
        exact = Estimate.exact(t.detach())
        return exact if t.dtype == dtype else exact.stored(dtype)

    x, w1, b1, w2, b2 = (None if t is None else read(t) for t in arguments)
    hidden, wide = w1.value.shape[0] if width is None else width, w1.value.shape[0]
    shape = x.value.shape
    x = Estimate(x.value.reshape(-1, shape[-1]), x.error.reshape(-1, shape[-1]))
    dy = Estimate.exact(dy.reshape(-1, dy.shape[-1]))
    w1 = Estimate(w1.value[:hidden], w1.error[:hidden])
    w2 = Estimate(w2.value[:, :hidden], w2.error[:, :hidden])

    def gelu(pre: Tensor) -> Tensor:
        return F.gelu(pre, approximate=APPROXIMATE[activation])

    def gelu_slope(pre: Tensor) -> Tensor:
        with torch.enable_grad():
            pre = pre.detach().requires_grad_()
            return torch.autograd.grad(gelu(pre).sum(), pre)[0]

    pre = x @ w1.T
    if b1 is not None:
        pre = pre + Estimate(b1.value[:hidden], b1.error[:hidden])
    pre = pre.stored(dtype)
    post, slope = (_apply(function, pre).stored(dtype) for function in (gelu, gelu_slope))
    y = post @ w2.T
    if b2 is not None:
        y = y + b2
    dpre = ((dy @ w2).stored(dtype) * slope).stored(dtype)

    def whole(part: Tensor, dim: int) -> Tensor:
        """Exactly zero beyond the width."""
        padding = [0, 0] * (part.dim() - 1 - dim) + [0, wide - hidden]
        return F.pad(part, padding)

    dw1, dw2 = ((left.T @ right).stored(dtype).error for left, right in ((dpre, x), (dy, post)))
    bounds = [y.stored(dtype).error.reshape(*shape[:-1], -1), (dpre @ w1).stored(dtype).error.reshape(shape)]
    bounds += [whole(dw1, 0)] + ([] if b1 is None else [whole(dpre.sum().stored(dtype).error, 0)])
    return bounds + [whole(dw2, 1)] + ([] if b2 is None else [dy.sum().stored(dtype).error])
