"""The matrix products of the MLP and its gradients, each with the plan's tile or by torch.

All functions take 2-D tokens, and weights already narrowed to the width in use, as views. Must not know in what order
they are computed (`passes.py`) or how plans are chosen (`tuning`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scalevit.kernels.gelu import accumulator_dtype, gelu_backward, gelu_forward
from scalevit.kernels.gelu_linear import linear_dgelu, linear_gelu
from scalevit.kernels.gemm import reduce_rows
from scalevit.kernels.tuning.tables import KernelPlan, Tile
from scalevit.kernels.weight_grad import weight_grad


@dataclass(frozen=True)
class Fc1:
    """fc1 and its activation, and where its gradients go.

    Attributes:
        weight: (h, D), any strides. bias: (h,) contiguous, or None.
        activation: "gelu" or "gelu_tanh".
        weight_grad, bias_grad: of the same shapes with unit inner strides; the backward fills them. None: not wanted.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None

    @property
    def wants_gradients(self) -> bool:
        return self.weight_grad is not None or self.bias_grad is not None

    def hidden(self, x: Tensor, *, save: str, plan: KernelPlan) -> tuple[Tensor, Tensor]:
        """post = act(x @ weight.T + bias): (M, h), and what `save` ("pre", "slope", "none") saves: (M, h), or empty."""
        if plan.fc1 is None:
            pre = F.linear(x, self.weight, self.bias)
            post, saved = gelu_forward(pre, activation=self.activation, save=save)
        else:
            post, saved = linear_gelu(
                x, self.weight, self.bias, activation=self.activation, save=save, tile=plan.fc1
            )  # fmt: skip
        return post, x.new_empty(0) if saved is None else saved

    def hidden_grad(
        self, dy: Tensor, w2: Tensor, saved: Tensor, *, save: str, plan: KernelPlan
    ) -> tuple[Tensor, Tensor | None]:
        """dpre = (dy @ w2) * act'(pre): (M, h), and post: (M, h) recomputed if `save` is "pre", else None.

        saved: (M, h), what `hidden` returned for the same `save`, "slope" or "pre". Fills bias_grad.
        """
        if plan.fc2_dgrad is None:
            dpre, post = gelu_backward(dy @ w2, saved, activation=self.activation, save=save)
            if self.bias_grad is not None:
                self.bias_grad.copy_(dpre.sum(0, dtype=accumulator_dtype(dpre.dtype)))
            return dpre, post
        dpre, post, partials = linear_dgelu(
            dy,
            w2,
            saved,
            activation=self.activation,
            save=save,
            partial_sums=self.bias_grad is not None,
            tile=plan.fc2_dgrad,
        )
        if self.bias_grad is not None and partials is not None:
            reduce_rows(partials, self.bias_grad)
        return dpre, post

    def input_grad(self, dpre: Tensor, *, tile: Tile | None) -> Tensor:
        """dpre @ weight: (M, D)."""
        if tile is None:
            return dpre @ self.weight
        return linear_dgelu(dpre, self.weight, None, activation="none", save="none", partial_sums=False, tile=tile)[0]

    def fill_weight_grad(self, dpre: Tensor, x: Tensor, *, tile: Tile | None) -> None:
        """weight_grad = dpre.T @ x, if it is wanted."""
        if self.weight_grad is not None:
            weight_grad_into(self.weight_grad, dpre, x, tile=tile)


def linear(x: Tensor, w: Tensor, bias: Tensor | None, *, tile: Tile | None) -> Tensor:
    """x @ w.T + bias: (M, N); x: (M, K), w: (N, K) with any strides."""
    if tile is None:
        return F.linear(x, w, bias)
    return linear_gelu(x, w, bias, activation="none", save="none", tile=tile)[0]


def weight_grad_into(out: Tensor, left: Tensor, right: Tensor, *, tile: Tile | None) -> None:
    """out = left.T @ right: (N, K), where out is a view of a whole gradient with unit inner stride.

    If out is fp32 and the operands narrower, the products' fp32 accumulators are written to it without rounding.
    """
    if tile is not None:
        weight_grad(left, right, out, tile=tile)
    elif left.dtype == out.dtype:
        torch.mm(left.T, right, out=out)
    elif left.is_cuda and out.dtype == torch.float32:
        torch.mm(left.T, right, out_dtype=torch.float32, out=out)
    else:
        # torch has no product with a wider result on a CPU; narrower results (fp32 tokens, bf16 weights) are rare.
        wider = torch.promote_types(left.dtype, out.dtype)
        out.copy_(left.T.to(wider) @ right.to(wider))
