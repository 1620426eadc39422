"""The matrix products before fc2 of a gated MLP and their gradients, each with the plan's tile or by torch.

Gate and value are computed into the two halves of one (M, 2h) buffer, in the order of a packed weight, so that a
packed weight of full width is one operand of the library's products. Must not know in what order they are computed
(`passes.py`) or how plans are chosen (`tuning`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scalevit.kernels.gated_linear import linear_dgate, linear_gate, sum_of_products
from scalevit.kernels.gating import gate_backward, gate_forward
from scalevit.kernels.gelu import accumulator_dtype
from scalevit.kernels.gemm import reduce_rows
from scalevit.kernels.products import weight_grad_into
from scalevit.kernels.tuning.tables import KernelPlan, Tile


@dataclass(frozen=True)
class Halves:
    """Tensors for gate and value, each of which may be missing. whole: the one that consists of just these two."""

    gate: Tensor | None = None
    value: Tensor | None = None
    whole: Tensor | None = None

    @property
    def both(self) -> tuple[Tensor | None, Tensor | None]:
        return self.gate, self.value


def halves_of(packed: Tensor, dim: int, gate_last: bool) -> tuple[Tensor, Tensor]:
    """The halves of gate and value of a tensor that holds the one after the other."""
    first, second = packed.chunk(2, dim)
    return (second, first) if gate_last else (first, second)


@dataclass(frozen=True)
class GatedFc1:
    """The layers of gate and value, and where their gradients go.

    Attributes:
        weights: (h, D) each, any strides; `whole` (2h, D) for a packed weight of full width.
        biases: (h,) contiguous each, or None; `whole` (2h,).
        activation: as in `gate_and_grad`.
        gate_last: the order of gate and value in `whole`, and in the buffers of hidden units.
        weight_grads, bias_grads: of the same shapes with unit inner strides; the backward fills them. None: not wanted.
    """

    weights: Halves
    biases: Halves
    activation: str
    gate_last: bool
    weight_grads: Halves
    bias_grads: Halves

    @property
    def wants_gradients(self) -> bool:
        return any(t is not None for t in (*self.weight_grads.both, *self.bias_grads.both))

    @property
    def weight_pair(self) -> tuple[Tensor, Tensor]:
        """Of gate and value, which are never missing."""
        assert self.weights.gate is not None
        assert self.weights.value is not None
        return self.weights.gate, self.weights.value

    def columns(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """The halves of gate and value, (M, h) each, of an (M, 2h) buffer."""
        return halves_of(buffer, 1, self.gate_last)

    def hidden(self, x: Tensor, *, save: str, plan: KernelPlan) -> tuple[Tensor, Tensor]:
        """post = act(gate) * value: (M, h), and what `save` ("pre", "slope", "none") saves: (M, 2h), or empty.

        That is gate and value, or what the gradient of post is multiplied by to give theirs.
        """
        if plan.fc1 is None:
            saved = self._pre(x)
            post = gate_forward(*self.columns(saved), activation=self.activation, save=save)
            return post, x.new_empty(0) if save == "none" else saved
        saved = x.new_empty(0) if save == "none" else self._buffer(x)
        post = linear_gate(
            x,
            self.weight_pair,
            self.biases.both,
            None if save == "none" else self.columns(saved),
            activation=self.activation,
            save=save,
            tile=plan.fc1,
        )
        return post, saved

    def _buffer(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], 2 * self.weight_pair[0].shape[0])

    def _pre(self, x: Tensor) -> Tensor:
        """Gate and value by the library: (M, 2h)."""
        if self.weights.whole is not None:
            return F.linear(x, self.weights.whole, self.biases.whole)
        pre = self._buffer(x)
        for out, weight, bias in zip(self.columns(pre), self.weight_pair, self.biases.both, strict=True):
            if bias is None:
                torch.mm(x, weight.T, out=out)
            else:
                torch.addmm(bias, x, weight.T, out=out)
        return pre

    def hidden_grad(
        self, dy: Tensor, w2: Tensor, saved: Tensor, *, save: str, plan: KernelPlan
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of gate and value: (M, 2h), and post: (M, h) recomputed if `save` is "pre", else None.

        saved: (M, 2h), what `hidden` returned for the same `save`, "slope" or "pre". Fills bias_grads.
        """
        dpre = torch.empty_like(saved)
        gradients = self.columns(dpre)
        if plan.fc2_dgrad is None:
            post = gate_backward(dy @ w2, *self.columns(saved), *gradients, activation=self.activation, save=save)
            for out, gradient in zip(self.bias_grads.both, gradients, strict=True):
                if out is not None:
                    out.copy_(gradient.sum(0, dtype=accumulator_dtype(dpre.dtype)))
            return dpre, post
        post, partials = linear_dgate(
            dy,
            w2,
            self.columns(saved),
            gradients,
            activation=self.activation,
            save=save,
            partial_sums=any(t is not None for t in self.bias_grads.both),
            tile=plan.fc2_dgrad,
        )
        if partials is not None:
            for out, sums in zip(self.bias_grads.both, partials, strict=True):
                if out is not None:
                    reduce_rows(sums, out)
        return dpre, post

    def input_grad(self, dpre: Tensor, *, tile: Tile | None) -> Tensor:
        """The gradient of x: (M, D)."""
        if tile is None and self.weights.whole is not None:
            return dpre @ self.weights.whole
        (dgate, dvalue), (gate, value) = self.columns(dpre), self.weight_pair
        if tile is None:
            return (dgate @ gate).addmm_(dvalue, value)
        return sum_of_products(dgate, gate, dvalue, value, tile=tile)

    def fill_weight_grad(self, dpre: Tensor, x: Tensor, *, tile: Tile | None) -> None:
        """The weights' gradients, those that are wanted."""
        if self.weight_grads.whole is not None:
            weight_grad_into(self.weight_grads.whole, dpre, x, tile=tile)
            return
        for out, gradient in zip(self.weight_grads.both, self.columns(dpre), strict=True):
            if out is not None:
                weight_grad_into(out, gradient, x, tile=tile)
