"""`fused_gated_mlp`: an MLP with a gate (SwiGLU, GEGLU) as one differentiable operation.

fc2(act(gate(x)) * value(x)). Gate and value are two weights (timm's `SwiGLU`), or the halves of one packed weight
(timm's `GluMlp` and `SwiGLUPacked`). A packed weight is read in place and gets one gradient, whose halves are filled in
place: nothing is copied, sliced or concatenated. Shared weights and sums in fp32: see `mlp.py`.

Must not know modules, engines or configs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scalevit.kernels import passes, support
from scalevit.kernels.reference import GATES, eager_gated_mlp, eager_packed_gated_mlp
from scalevit.kernels.tuning.tables import find_plan

if not support.TRITON_MISSING:
    from scalevit.kernels.gated_products import GatedFc1, Halves, halves_of


def fused_gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    width: int | None = None,
    activation: str = "silu",
    save: str = "fast",
    backend: str = "auto",
) -> Tensor:
    """fc2(act(gate(x)) * value(x)), in fused Triton kernels where they can run, else in eager PyTorch.

    Args:
        x: (..., D), any strides.
        gate_weight, value_weight: (H, D). gate_bias, value_bias: (H,) or None, independently of each other.
        fc2_weight: (D_out, H). fc2_bias: (D_out,) or None.
        width: use only the first `width` hidden units, the same of gate and value, reading the weights in place; the
            gradients beyond it are exactly zero. A multiple of 16, at most H. None means H.
        activation: of the gate, "silu" (SwiGLU), "gelu" (GEGLU, exact) or "gelu_tanh".
        save: what is saved for the backward besides x, in bytes per token for 2-byte dtypes: "fast" the hidden units
            and the factors of both gradients (6 * width), "lean" gate and value (4 * width), "recompute" nothing.
            "fast" and "recompute" give bitwise equal results; "lean" rounds gate and value to the dtype before the
            activation, as eager PyTorch does.
        backend: as in `fused_mlp`.

    Returns:
        (..., D_out), in x's dtype, or autocast's.

    Dtypes, derivatives, determinism and errors as in `fused_mlp`.

    Source: GLU variants of arXiv:2002.05202.
    """
    tensors = {
        "x": x, "gate_weight": gate_weight, "gate_bias": gate_bias, "value_weight": value_weight,
        "value_bias": value_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias,
    }  # fmt: skip
    support.check_options(activation, tuple(GATES), save, backend)
    width = support.check_width(width, support.check_tensors(tensors, ("gate", "value")))
    if support.runs_in_triton("fused_gated_mlp", x, gate_weight, backend):
        layers = (gate_weight, gate_bias, value_weight, value_bias)
        return _fused(x, *layers, fc2_weight, fc2_bias, width, activation, save, gate_last=False)
    return eager_gated_mlp(
        x, gate_weight, gate_bias, value_weight, value_bias, fc2_weight, fc2_bias, width=width, activation=activation
    )


def fused_packed_gated_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    gate_last: bool = False,
    width: int | None = None,
    activation: str = "silu",
    save: str = "fast",
    backend: str = "auto",
) -> Tensor:
    """`fused_gated_mlp` with gate and value packed into one weight; its gradient is one tensor.

    Args:
        x, fc2_weight, fc2_bias, activation, save, backend: as in `fused_gated_mlp`.
        fc1_weight: (2 * H, D). fc1_bias: (2 * H,) or None. The first H rows are the gate's and the others the value's,
            or the other way round with `gate_last` (the default of timm's `GluMlp`).
        width: use only the first `width` hidden units: as many of the first rows of either half.

    Returns, dtypes, derivatives, determinism and errors: as in `fused_gated_mlp`.
    """
    tensors = {
        "x": x, "fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias,
    }  # fmt: skip
    support.check_options(activation, tuple(GATES), save, backend)
    width = support.check_width(width, support.check_tensors(tensors, ("fc1",), halves=2))
    if support.runs_in_triton("fused_gated_mlp", x, fc1_weight, backend):
        layers = (fc1_weight, fc1_bias, None, None)
        return _fused(x, *layers, fc2_weight, fc2_bias, width, activation, save, gate_last=gate_last)
    return eager_packed_gated_mlp(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate_last=gate_last, width=width, activation=activation
    )


def _fused(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    width: int,
    activation: str,
    save: str,
    *,
    gate_last: bool,
) -> Tensor:
    parameters = (w1, b1, value_weight, value_bias, w2, b2)
    save = passes.save_mode(save, (x, *parameters))
    fp32_grads = [w is not None and passes.wants_fp32_grad(w) for w in (w1, value_weight, w2)]
    y, _, _ = torch.ops.scalevit.fused_gated_mlp(
        passes.tokens(x), *parameters, width, activation, save, gate_last, fp32_grads
    )
    return passes.like_input(y, x)


@torch.library.custom_op("scalevit::fused_gated_mlp", mutates_args=())
def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, value_weight: Tensor | None, value_bias: Tensor | None, w2: Tensor,
    b2: Tensor | None, width: int, activation: str, save: str, gate_last: bool, fp32_grads: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x (M, D) -> y (M, D_out) and what is saved for the backward.

    w1, b1: the gate's, or packed ones of gate and value if there is no value_weight. Saved are, in one (M, 2 * width)
    tensor, the factors of both gradients after the hidden units for "fast", gate and value after an empty tensor for
    "lean"; two empty tensors otherwise. Dtypes, and fp32_grads (of w1, value_weight and w2), as in `mlp.py`.
    """
    with passes.launching_on(x.device):
        plan = find_plan(x, width, save, gated=True)
        first = _first_layers(x, w1, b1, value_weight, value_bias, width, activation, gate_last)
        return passes.forward(x, first, w2[:, :width].to(x.dtype), b2, save=save, plan=plan)


@_forward.register_fake
def _(x, w1, b1, value_weight, value_bias, w2, b2, width, activation, save, gate_last, fp32_grads):
    return (
        x.new_empty(x.shape[0], w2.shape[0]),
        x.new_empty((x.shape[0], width) if save == "fast" else 0),
        x.new_empty((x.shape[0], 2 * width) if save in ("fast", "lean") else 0),
    )


@torch.library.custom_op("scalevit::fused_gated_mlp_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, value_weight: Tensor | None, value_bias: Tensor | None,
    w2: Tensor, saved_post: Tensor, saved: Tensor, width: int, activation: str, save: str, gate_last: bool,
    fp32_grads: list[bool], b2_dtype: torch.dtype | None, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and of `_forward`'s parameters; those not in `needs` are empty. saved_post, saved: its results."""
    need_dx, need_w1, need_b1, need_value_weight, need_value_bias, need_w2, need_b2 = needs
    fp32_w1, fp32_value_weight, fp32_w2 = fp32_grads
    dw1 = passes.new_gradient(w1, need_w1, fp32=fp32_w1)
    db1 = passes.new_gradient(b1, need_b1)
    dvalue_weight = passes.new_gradient(value_weight, need_value_weight, fp32=fp32_value_weight)
    dvalue_bias = passes.new_gradient(value_bias, need_value_bias)
    dw2 = passes.new_gradient(w2, need_w2, fp32=fp32_w2)
    db2 = dy.new_empty(dy.shape[1], dtype=b2_dtype) if need_b2 else None
    with passes.launching_on(x.device):
        packed = value_weight is None
        wanted = [
            _halves(w, v, packed, gate_last, width, passes.used_part)
            for w, v in ((dw1, dvalue_weight), (db1, dvalue_bias))
        ]
        first = _first_layers(x, w1, b1, value_weight, value_bias, width, activation, gate_last, *wanted)
        dx = passes.backward(
            dy, x, first, w2[:, :width].to(x.dtype), saved_post, saved, save=save,
            plan=find_plan(x, width, save, gated=True), need_dx=need_dx, w2_grad=passes.used_part(dw2, width, 1),
            b2_grad=db2,
        )  # fmt: skip
    dx, dw1, db1, dvalue_weight, dvalue_bias, dw2, db2 = passes.or_empty(
        x, (dx, dw1, db1, dvalue_weight, dvalue_bias, dw2, db2)
    )
    return dx, dw1, db1, dvalue_weight, dvalue_bias, dw2, db2


@_backward.register_fake
def _(
    dy, x, w1, b1, value_weight, value_bias, w2, saved_post, saved, width, activation, save, gate_last, fp32_grads,
    b2_dtype, needs
):  # fmt: skip
    likes = (x, w1, b1, value_weight, value_bias, w2)
    fp32 = (False, fp32_grads[0], False, fp32_grads[1], False, fp32_grads[2])
    dtypes = [None if t is None else torch.float32 if f else t.dtype for t, f in zip(likes, fp32, strict=True)]
    shapes = [None if t is None else t.shape for t in likes]
    return passes.fake_gradients(x, (*shapes, (dy.shape[1],)), (*dtypes, b2_dtype), needs)


passes.register_autograd("fused_gated_mlp", _forward, _backward, tensors=7)


def _first_layers(
    x: Tensor, w1: Tensor, b1: Tensor | None, value_weight: Tensor | None, value_bias: Tensor | None,
    width: int, activation: str, gate_last: bool, weight_grads: Halves | None = None, bias_grads: Halves | None = None,
) -> GatedFc1:  # fmt: skip
    """The first `width` units of gate and value as views; weights are copied only where autocast casts them."""
    packed = value_weight is None
    if packed and w1.shape[0] == 2 * width:  # cast at once what the library's products read at once
        w1, b1 = w1.to(x.dtype), passes.bias_for(x, b1)
    weights = _halves(w1, value_weight, packed, gate_last, width, lambda w, width: w[:width].to(x.dtype))
    biases = _halves(b1, value_bias, packed, gate_last, width, lambda b, width: passes.bias_for(x, b[:width]))
    return GatedFc1(weights, biases, activation, gate_last, weight_grads or Halves(), bias_grads or Halves())


def _halves(
    first: Tensor | None, second: Tensor | None, packed: bool, gate_last: bool, width: int,
    use: Callable[[Tensor, int], Tensor | None],
) -> Halves:  # fmt: skip
    """Those of the gate and of the value, of one packed tensor or of two. use: narrows a tensor to the width."""
    whole = None
    if packed and first is not None:
        whole = first if first.shape[0] == 2 * width else None
        first, second = halves_of(first, 0, gate_last)
    gate, value = (None if t is None else use(t, width) for t in (first, second))
    return Halves(gate, value, whole)
