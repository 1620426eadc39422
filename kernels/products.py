"""The six matrix products of the MLP and its gradients, each with the plan's tile or by torch.

All functions take 2-D tokens, and weights already narrowed to the width in use, as views. Must not know what is
computed from them (`mlp.py`) or how plans are chosen (`tuning`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scalevit.kernels.gelu import accumulator_dtype, gelu_backward, gelu_forward
from scalevit.kernels.gelu_linear import linear_dgelu, linear_gelu, reduce_rows
from scalevit.kernels.tuning.tables import KernelPlan, Tile
from scalevit.kernels.weight_grad import weight_grad


def hidden(
    x: Tensor, w1: Tensor, b1: Tensor | None, *, activation: str, save: str, plan: KernelPlan
) -> tuple[Tensor, Tensor]:
    """post = act(x @ w1.T + b1): (M, h), and what `save` ("pre", "slope", "none") saves: (M, h), or empty."""
    if plan.fc1 is None:
        post, saved = gelu_forward(F.linear(x, w1, b1), activation=activation, save=save)
    else:
        post, saved = linear_gelu(x, w1, b1, activation=activation, save=save, tile=plan.fc1)
    return post, x.new_empty(0) if saved is None else saved


def linear(x: Tensor, w: Tensor, bias: Tensor | None, *, tile: Tile | None) -> Tensor:
    """x @ w.T + bias: (M, N); x: (M, K), w: (N, K) with any strides."""
    if tile is None:
        return F.linear(x, w, bias)
    return linear_gelu(x, w, bias, activation="none", save="none", tile=tile)[0]


def hidden_grad(
    dy: Tensor, w2: Tensor, saved: Tensor, *, activation: str, save: str, bias_out: Tensor | None, plan: KernelPlan
) -> tuple[Tensor, Tensor | None]:
    """dpre = (dy @ w2) * act'(pre): (M, h), and post: (M, h) recomputed if `save` is "pre", else None.

    saved: (M, h), what `hidden` returned for the same `save`, "slope" or "pre". bias_out: (h,) or None; the sum of dpre
    over tokens is written to it.
    """
    if plan.fc2_dgrad is None:
        dpre, post = gelu_backward(dy @ w2, saved, activation=activation, save=save)
        if bias_out is not None:
            bias_out.copy_(dpre.sum(0, dtype=accumulator_dtype(dpre.dtype)))
        return dpre, post
    dpre, post, partials = linear_dgelu(
        dy,
        w2,
        saved,
        activation=activation,
        save=save,
        partial_sums=bias_out is not None,
        tile=plan.fc2_dgrad,
    )
    if bias_out is not None and partials is not None:
        reduce_rows(partials, bias_out)
    return dpre, post


def input_grad(dpre: Tensor, w1: Tensor, *, tile: Tile | None) -> Tensor:
    """dpre @ w1: (M, D)."""
    if tile is None:
        return dpre @ w1
    return linear_dgelu(dpre, w1, None, activation="none", save="none", partial_sums=False, tile=tile)[0]


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
