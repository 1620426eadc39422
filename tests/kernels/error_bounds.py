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

from scalevit.kernels.reference import GATES

# Independent errors add up to less than this many times the root of the sum of their bounds' squares. Rounding errors
# are spread evenly up to their bounds, so that this is 7 of their standard deviations.
DEVIATIONS = 3
# Both GELUs of the kernels (erf in fp32, the polynomial for bf16 and fp16) and their derivatives, twice what
# `test_gelu_kernels` allows for the polynomial. SiLU is within it too: its logistic is wrong by a few steps of fp32
# where it is not yet 1, which is below x = 17.
ACTIVATION_ERROR = 2.4e-6
# Between these gelu, gelu', their tanh forms, silu and silu' are monotone.
TURNING_POINTS = (
    -2.3994, -2.3993, -1.4243, -1.4142, -1.2785, -1.2784, -0.7525, -0.7518, 1.4142, 1.4243, 2.3993, 2.3994,
)  # fmt: skip
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
    return Estimate(value, change + ACTIVATION_ERROR)


def error_bounds(
    arguments: list[Tensor | None], dy: Tensor, *, width: int | None, activation: str, dtype: torch.dtype
) -> list[Tensor]:
    """Bounds of y and of the gradients of the arguments that are not None, for an MLP computed in `dtype`.

    They allow every rounding that eager or a save mode of fused_mlp makes: arguments of another dtype (autocast); pre,
    post, slope, dpost and dpre when they are stored; each result once. Sums are in fp32. dy is taken as it is.
    """

    x, w1, b1, w2, b2 = _read(arguments, width, dtype)
    dy = Estimate.exact(dy.reshape(-1, dy.shape[-1]))
    pre = _linear(x, w1, b1).stored(dtype)
    post, slope = _activate(pre, activation, dtype)
    dpre = ((dy @ w2).stored(dtype) * slope).stored(dtype)
    gradients = [*_of_layer(dpre, x), *_of_layer(dy, post)]
    return _bounds(arguments, [_linear(post, w2, b2), dpre @ w1, *gradients], dtype)


def gated_error_bounds(
    arguments: list[Tensor | None], dy: Tensor, *, width: int | None, activation: str, dtype: torch.dtype
) -> list[Tensor]:
    """The same for a gated MLP with separate weights, in the order of fused_gated_mlp's arguments.

    They allow every rounding that eager or a save mode makes: gate, value, act(gate), act'(gate), the hidden units and
    their gradient, either of the products that make the gradient of the gate, and both terms of dx.
    """
    x, gate_w, gate_b, value_w, value_b, w2, b2 = _read(arguments, width, dtype)
    dy = Estimate.exact(dy.reshape(-1, dy.shape[-1]))
    gate, value = (_linear(x, *layer).stored(dtype) for layer in ((gate_w, gate_b), (value_w, value_b)))
    activated, slope = _activate(gate, activation, dtype)
    post = (activated * value).stored(dtype)
    dpost = (dy @ w2).stored(dtype)
    dvalue = (dpost * activated).stored(dtype)
    # As eager multiplies, and with the product that "fast" saves.
    orders = (dpost * value).stored(dtype) * slope, dpost * (value * slope).stored(dtype)
    dgate = Estimate(orders[0].value, torch.maximum(orders[0].error, orders[1].error)).stored(dtype)
    dx = (dgate @ gate_w).stored(dtype) + (dvalue @ value_w).stored(dtype)
    gradients = [*_of_layer(dgate, x), *_of_layer(dvalue, x), *_of_layer(dy, post)]
    return _bounds(arguments, [_linear(post, w2, b2), dx, *gradients], dtype)


def _read(arguments: list[Tensor | None], width: int | None, dtype: torch.dtype) -> list[Estimate | None]:
    """The arguments at the width in use, with x as rows."""
    x, *first, w2, b2 = arguments
    narrowed = [x.reshape(-1, x.shape[-1]), *(None if t is None else t[:width] for t in first), w2[:, :width], b2]
    exact = [None if t is None else Estimate.exact(t.detach()) for t in narrowed]
    return [e if e is None or t.dtype == dtype else e.stored(dtype) for e, t in zip(exact, narrowed, strict=True)]


def _linear(x: Estimate, w: Estimate, b: Estimate | None) -> Estimate:
    return x @ w.T if b is None else x @ w.T + b


def _activate(pre: Estimate, activation: str, dtype: torch.dtype) -> tuple[Estimate, Estimate]:
    """The activation and its derivative, as they are stored."""

    def slope(pre: Tensor) -> Tensor:
        with torch.enable_grad():
            pre = pre.detach().requires_grad_()
            return torch.autograd.grad(GATES[activation](pre).sum(), pre)[0]

    value, derivative = (_apply(function, pre).stored(dtype) for function in (GATES[activation], slope))
    return value, derivative


def _of_layer(gradient: Estimate, x: Estimate) -> tuple[Estimate, Estimate]:
    """The gradients of a linear layer's weight and bias."""
    return gradient.T @ x, gradient.sum()


def _bounds(arguments: list[Tensor | None], results: list[Estimate], dtype: torch.dtype) -> list[Tensor]:
    """The bounds of y and of the arguments' gradients, rounded once; exactly zero beyond the width."""
    y, dx, *gradients = (e.stored(dtype).error for e in results)
    x, *parameters = arguments
    bounds = [y.reshape(*x.shape[:-1], -1), dx.reshape(x.shape)]
    for parameter, bound in zip(parameters, gradients, strict=True):
        if parameter is not None:
            rest = [whole - used for whole, used in zip(parameter.shape, bound.shape, strict=True)]
            bounds.append(F.pad(bound, [size for r in reversed(rest) for size in (0, r)]))
    return bounds
