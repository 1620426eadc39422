"""`fused_mlp`: fc1, GELU and fc2 as one differentiable operation.

The forward and the backward are two custom operators, so `torch.compile(fullgraph=True)`, activation checkpointing,
DDP, FSDP2 and ZeRO see two opaque nodes. Each combines the matrix products of `products.py`.

Shared weights: each use contributes one gradient in the weight's dtype, and autograd adds them up. For sums in fp32 of
narrower weights, an engine sets `parameter.grad_dtype = torch.float32` (torch 2.11 and later): the operator then
returns the fp32 accumulators of its matrix products for that parameter, and autograd adds and stores them in fp32
through the ordinary hooks, so DDP, FSDP and ZeRO still see every gradient. Under torch.compile each use's gradient is
still rounded to the weight's dtype; only their sum is fp32.

Must not know modules, engines or configs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalevit.kernels import passes, support
from scalevit.kernels.reference import APPROXIMATE, eager_mlp
from scalevit.kernels.tuning.tables import find_plan

if not support.TRITON_MISSING:
    from scalevit.kernels.products import Fc1


def fused_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    width: int | None = None,
    activation: str = "gelu",
    save: str = "fast",
    backend: str = "auto",
) -> Tensor:
    """fc2(gelu(fc1(x))), in fused Triton kernels where they can run, else in eager PyTorch.

    Args:
        x: (..., D), any strides.
        fc1_weight: (H, D). fc1_bias: (H,) or None. fc2_weight: (D_out, H). fc2_bias: (D_out,) or None.
        width: use only the first `width` hidden units, reading `fc1_weight[:width]`, `fc1_bias[:width]` and
            `fc2_weight[:, :width]` in place; their gradients beyond it are exactly zero. A multiple of 16, at
            most H. None means H, which need not be a multiple of 16.
        activation: "gelu" (exact, erf) or "gelu_tanh".
        save: what is saved for the backward besides x, in bytes per token for 2-byte dtypes: "fast" gelu and
            gelu' (4 * width), "lean" the pre-activation (2 * width), "recompute" nothing. "fast" and
            "recompute" give bitwise equal results; "lean" rounds the pre-activation once more, as eager PyTorch does.
        backend: "auto" runs Triton where it can and eager PyTorch elsewhere: silently on a CPU, with one warning
            that gives the reason on an accelerator. "triton" raises where it cannot run; "eager" is eager PyTorch.

    Returns:
        (..., D_out), in x's dtype, or autocast's.

    Dtypes: fp32, bf16 or fp16, the same for all arguments; fp64 runs in eager PyTorch. Under autocast the dtypes may
    differ: x is cast, the weights are cast where they are read, and each gradient has its parameter's dtype, rounded
    once.

    Double backward is not supported and raises. Under forward-mode differentiation and torch.func.grad the call runs
    in eager PyTorch with backend="auto", and raises with "triton". Deterministic: equal inputs give bitwise equal
    results.

    Raises:
        TypeError: an argument is not a tensor of a supported dtype, or dtypes differ without autocast.
        ValueError: shapes, devices, width, activation, save or backend are not valid; it names the argument.
        RuntimeError: backend="triton" where Triton cannot run these tensors.

    Source: the exact and tanh GELU of arXiv:1606.08415; narrowing and sharing of arXiv:2512.01059.
    """
    tensors = {
        "x": x, "fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias,
    }  # fmt: skip
    support.check_options(activation, tuple(APPROXIMATE), save, backend)
    width = support.check_width(width, support.check_tensors(tensors, ("fc1",)))
    if not support.runs_in_triton("fused_mlp", x, fc1_weight, backend):
        return eager_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, width=width, activation=activation)
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    save = passes.save_mode(save, (x, *parameters))
    fp32_grads = (passes.wants_fp32_grad(fc1_weight), passes.wants_fp32_grad(fc2_weight))
    y, _, _ = torch.ops.scalevit.fused_mlp(passes.tokens(x), *parameters, width, activation, save, *fp32_grads)
    return passes.like_input(y, x)


@torch.library.custom_op("scalevit::fused_mlp", mutates_args=())
def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    width: int, activation: str, save: str, fp32_grad_w1: bool, fp32_grad_w2: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x (M, D) -> y (M, D_out) and what is saved for the backward.

    That is post and gelu' for "fast", an empty tensor and the pre-activation for "lean", two empty tensors otherwise.
    The computation runs in x's dtype; weights of another dtype are cast as they are read. fp32_grad_w1 and
    fp32_grad_w2 ask for fp32 weight gradients; the forward only passes them to the backward.
    """
    with passes.launching_on(x.device):
        plan = find_plan(x, width, save)
        return passes.forward(x, _fc1(x, w1, b1, width, activation), _fc2(x, w2, width), b2, save=save, plan=plan)


@_forward.register_fake
def _(x, w1, b1, w2, b2, width, activation, save, fp32_grad_w1, fp32_grad_w2):
    hidden = (x.shape[0], width)
    return (
        x.new_empty(x.shape[0], w2.shape[0]),
        x.new_empty(hidden if save == "fast" else 0),
        x.new_empty(hidden if save in ("fast", "lean") else 0),
    )


@torch.library.custom_op("scalevit::fused_mlp_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, saved_post: Tensor, saved: Tensor,
    width: int, activation: str, save: str, fp32_grad_w1: bool, fp32_grad_w2: bool,
    b2_dtype: torch.dtype | None, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, w1, b1, w2, b2; those not in `needs` are empty. saved_post, saved: what `_forward` returned."""
    need_dx, need_w1, need_b1, need_w2, need_b2 = needs
    dw1 = passes.new_gradient(w1, need_w1, fp32=fp32_grad_w1)
    db1 = passes.new_gradient(b1, need_b1)
    dw2 = passes.new_gradient(w2, need_w2, fp32=fp32_grad_w2)
    db2 = dy.new_empty(dy.shape[1], dtype=b2_dtype) if need_b2 else None
    with passes.launching_on(x.device):
        wanted = (passes.used_part(dw1, width), passes.used_part(db1, width))
        dx = passes.backward(
            dy, x, _fc1(x, w1, b1, width, activation, *wanted), _fc2(x, w2, width), saved_post, saved, save=save,
            plan=find_plan(x, width, save), need_dx=need_dx, w2_grad=passes.used_part(dw2, width, 1), b2_grad=db2,
        )  # fmt: skip
    dx, dw1, db1, dw2, db2 = passes.or_empty(x, (dx, dw1, db1, dw2, db2))
    return dx, dw1, db1, dw2, db2


@_backward.register_fake
def _(
    dy, x, w1, b1, w2, saved_post, saved, width, activation, save, fp32_grad_w1, fp32_grad_w2, b2_dtype, needs
):  # fmt: skip
    shapes = (x.shape, w1.shape, b1 if b1 is None else b1.shape, w2.shape, (dy.shape[1],))
    dtypes = (
        x.dtype,
        torch.float32 if fp32_grad_w1 else w1.dtype,
        None if b1 is None else b1.dtype,
        torch.float32 if fp32_grad_w2 else w2.dtype,
        b2_dtype,
    )
    return passes.fake_gradients(x, shapes, dtypes, needs)


passes.register_autograd("fused_mlp", _forward, _backward, tensors=5)


def _fc1(
    x: Tensor, w1: Tensor, b1: Tensor | None, width: int, activation: str,
    weight_grad: Tensor | None = None, bias_grad: Tensor | None = None,
) -> Fc1:  # fmt: skip
    """fc1's first `width` units as views; a weight is copied only where autocast asks for another dtype."""
    bias = None if b1 is None else passes.bias_for(x, b1[:width])
    return Fc1(w1[:width].to(x.dtype), bias, activation, weight_grad, bias_grad)


def _fc2(x: Tensor, w2: Tensor, width: int) -> Tensor:
    return w2[:, :width].to(x.dtype)
