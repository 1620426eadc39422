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

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from scalevit.kernels import support
from scalevit.kernels.reference import eager_mlp
from scalevit.kernels.tuning.tables import KEPT, find_plan

if not support.TRITON_MISSING:
    from scalevit.kernels import products
    from scalevit.kernels.gelu import accumulator_dtype


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
    support.check_arguments(tensors, width, activation, save, backend)
    width = fc1_weight.shape[0] if width is None else width
    if backend != "eager":
        reason = support.unsupported_call_reason(x, fc1_weight)
        if reason and backend == "triton":
            raise RuntimeError(f"backend='triton' cannot run here: {reason}")
        if reason and x.device.type not in ("cpu", "meta"):
            support.warn_once(reason)
        if not reason:
            return _fused(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, width, activation, save)
    return eager_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, width=width, activation=activation)


def _fused(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    width: int,
    activation: str,
    save: str,
) -> Tensor:
    dtype = support.compute_dtype(x)
    if x.dtype != dtype:
        x = x.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        # Activations may be copied (weights never): both products that read x need its channels contiguous.
        rows = rows.contiguous()
    tensors = (x, w1, b1, w2, b2)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        save = "none"
    fp32_grads = (_wants_fp32_grad(w1), _wants_fp32_grad(w2))
    y, _, _ = torch.ops.scalevit.fused_mlp(rows, w1, b1, w2, b2, width, activation, save, *fp32_grads)
    # Nothing else refers to y, so autograd need not treat the result as a view of it: FSDP2 hooks the output of a
    # module, and an in-place addition to a view drops the hook.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], w2.shape[0]))


def _wants_fp32_grad(weight: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # dynamo cannot trace grad_dtype (torch 2.11 to 2.15)
    return weight.is_leaf and weight.dtype != torch.float32 and weight.grad_dtype == torch.float32


# ---------------------------------------------------------------------------------------------- operators


@contextmanager
def _launching_on(device: torch.device) -> Iterator[None]:
    """Disables autocast (the dtypes are fixed by now) and makes the tensors' device current, where Triton launches."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.autocast(device.type, enabled=False), current:
        yield


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
    with _launching_on(x.device):
        w1, b1, w2 = _narrow(x, width, w1, b1, w2)
        plan = find_plan(x, width, save)
        kept = "none" if save == "recompute" else KEPT[save]
        post, saved = products.hidden(x, w1, b1, activation=activation, save=kept, plan=plan)
        y = products.linear(post, w2, None if b2 is None else b2.to(x.dtype).contiguous(), tile=plan.fc2)
        return y, post if save == "fast" else x.new_empty(0), saved


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
    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    dx, dw1, db1, dw2, db2 = (x.new_empty(0) for _ in range(5))
    with _launching_on(x.device):
        plan = find_plan(x, width, save)
        narrow_w1, narrow_b1, narrow_w2 = _narrow(x, width, w1, b1, w2)
        if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
            dy = dy.contiguous()  # the expanded gradient of sum() has strides of zero
        if save == "recompute":
            # The same kernel and the same rounding as in the forward of "fast": bitwise equal gradients.
            saved_post, saved = products.hidden(x, narrow_w1, narrow_b1, activation=activation, save="slope", plan=plan)
        if need_b2 and b2_dtype is not None:
            db2 = dy.sum(0, dtype=accumulator_dtype(dy.dtype)).to(b2_dtype)
        post = saved_post
        if need_x or need_w1 or need_b1 or save == "lean":
            bias_out = None
            if need_b1 and b1 is not None:
                db1, bias_out = _gradient(b1, width, 0, fp32=False)
            kept = "pre" if save == "lean" else "slope"
            dpre, recomputed = products.hidden_grad(
                dy, narrow_w2, saved, activation=activation, save=kept, bias_out=bias_out, plan=plan
            )
            post = saved_post if recomputed is None else recomputed
            if need_x:
                dx = products.input_grad(dpre, narrow_w1, tile=plan.fc1_dgrad)
            if need_w1:
                dw1, used = _gradient(w1, width, 0, fp32_grad_w1)
                products.weight_grad_into(used, dpre, x, tile=plan.fc1_wgrad)
            del dpre  # the largest buffer here; free it before the next product allocates its own
        if need_w2:
            dw2, used = _gradient(w2, width, 1, fp32_grad_w2)
            products.weight_grad_into(used, dy, post, tile=plan.fc2_wgrad)
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
    return tuple(
        x.new_empty(shape, dtype=d) if need else x.new_empty(0)
        for shape, d, need in zip(shapes, dtypes, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, w1, b1, w2, b2, width, activation, save, fp32_grad_w1, fp32_grad_w2 = inputs
    _, saved_post, saved = output
    ctx.mark_non_differentiable(saved_post, saved)
    ctx.save_for_backward(x, w1, b1, w2, saved_post, saved)
    ctx.options = (width, activation, save, fp32_grad_w1, fp32_grad_w2, None if b2 is None else b2.dtype)


def _autograd(ctx, dy, _dpost, _dsaved):
    needs = list(ctx.needs_input_grad[:5])
    grads = torch.ops.scalevit.fused_mlp_backward(dy, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None, None


def _no_double_backward(ctx, *grads):
    raise RuntimeError("fused_mlp has no double backward: use backend='eager' where gradients of gradients are needed")


_forward.register_autograd(_autograd, setup_context=_setup_context)
_backward.register_autograd(_no_double_backward)


def _narrow(x: Tensor, width: int, w1: Tensor, b1: Tensor | None, w2: Tensor):
    """Views of the first `width` hidden units; weights are copied only where autocast asks for another dtype."""
    return (
        w1[:width].to(x.dtype),
        # The kernels read a bias without strides; it is small enough to copy.
        None if b1 is None else b1[:width].to(x.dtype).contiguous(),
        w2[:, :width].to(x.dtype),
    )


def _gradient(like: Tensor, width: int, dim: int, fp32: bool) -> tuple[Tensor, Tensor]:
    """A gradient for `like` with zeros beyond `width`, and the view of it that the caller must fill."""
    out = torch.empty(like.shape, dtype=torch.float32 if fp32 else like.dtype, device=like.device)
    out.narrow(dim, width, like.shape[dim] - width).zero_()
    return out, out.narrow(dim, 0, width)
