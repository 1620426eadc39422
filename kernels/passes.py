"""The forward and the backward pass of an MLP, and how they become an operator that autograd knows.

`mlp.py` and `gated_mlp.py` define their operators with these. An operator is a pair of custom operators, so
`torch.compile(fullgraph=True)`, activation checkpointing, DDP, FSDP2 and ZeRO see two opaque nodes.

Must not know modules, engines or configs, nor what precedes fc2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from scalevit.kernels import support
from scalevit.kernels.tuning.tables import KEPT, KernelPlan, Tile

if not support.TRITON_MISSING:
    from scalevit.kernels import products
    from scalevit.kernels.gelu import accumulator_dtype


class FirstLayers(Protocol):
    """What precedes fc2, at the width in use, with its weights and where their gradients go; see `products.Fc1`."""

    @property
    def wants_gradients(self) -> bool: ...
    def hidden(self, x: Tensor, *, save: str, plan: KernelPlan) -> tuple[Tensor, Tensor]: ...
    def hidden_grad(
        self, dy: Tensor, w2: Tensor, saved: Tensor, *, save: str, plan: KernelPlan
    ) -> tuple[Tensor, Tensor | None]: ...
    def input_grad(self, dpre: Tensor, *, tile: Tile | None) -> Tensor: ...
    def fill_weight_grad(self, dpre: Tensor, x: Tensor, *, tile: Tile | None) -> None: ...


# ---------------------------------------------------------------------------------------------- before the operator


def tokens(x: Tensor) -> Tensor:
    """x (..., D) as the rows (M, D) that an operator takes, in the dtype of the computation."""
    dtype = support.compute_dtype(x)
    if x.dtype != dtype:
        x = x.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    # Activations may be copied (weights never): all products that read x need its channels contiguous.
    return rows if rows.stride(1) == 1 else rows.contiguous()


def save_mode(save: str, tensors: Sequence[Tensor | None]) -> str:
    """`save`, or "none" where no backward can follow."""
    if not torch.is_grad_enabled():
        return "none"
    # Inside vmap a tensor does not say whether the one outside requires a gradient.
    needed = support.is_under_vmap() or any(t is not None and t.requires_grad for t in tensors)
    return save if needed else "none"


def wants_fp32_grad(weight: Tensor) -> bool:
    """Whether an engine has asked for an fp32 gradient of a narrower weight, see `mlp.py`."""
    if torch.compiler.is_compiling():
        return False  # dynamo cannot trace grad_dtype (torch 2.11 to 2.15)
    return weight.is_leaf and weight.dtype != torch.float32 and weight.grad_dtype == torch.float32


def like_input(y: Tensor, x: Tensor) -> Tensor:
    """An operator's result y (M, D_out) in x's leading shape: (..., D_out)."""
    # Nothing else refers to y, so autograd need not treat the result as a view of it: FSDP2 hooks the output of a
    # module, and an in-place addition to a view drops the hook.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))


# ---------------------------------------------------------------------------------------------- inside the operator


@contextmanager
def launching_on(device: torch.device) -> Iterator[None]:
    """Disables autocast (the dtypes are fixed by now) and makes the tensors' device current, where Triton launches."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.autocast(device.type, enabled=False), current:
        yield


def bias_for(x: Tensor, bias: Tensor | None) -> Tensor | None:
    """A bias in x's dtype. The kernels read it without strides; it is small enough to copy."""
    return None if bias is None else bias.to(x.dtype).contiguous()


def new_gradient(like: Tensor | None, wanted: bool, *, fp32: bool = False) -> Tensor | None:
    """An uninitialised gradient for a parameter, or None if it is not wanted or there is no parameter."""
    if like is None or not wanted:
        return None
    return torch.empty(like.shape, dtype=torch.float32 if fp32 else like.dtype, device=like.device)


def used_part(gradient: Tensor | None, width: int, dim: int = 0) -> Tensor | None:
    """The view of a gradient that the backward must fill; what lies beyond `width` is set to zero here."""
    if gradient is None:
        return None
    gradient.narrow(dim, width, gradient.shape[dim] - width).zero_()
    return gradient.narrow(dim, 0, width)


def forward(
    x: Tensor, first: FirstLayers, w2: Tensor, b2: Tensor | None, *, save: str, plan: KernelPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """y (M, D_out), and what is saved for the backward: the hidden units for "fast", and what `first` saves."""
    kept = "none" if save == "recompute" else KEPT[save]
    post, saved = first.hidden(x, save=kept, plan=plan)
    y = products.linear(post, w2, bias_for(x, b2), tile=plan.fc2)
    return y, post if save == "fast" else x.new_empty(0), saved


def backward(
    dy: Tensor, x: Tensor, first: FirstLayers, w2: Tensor, saved_post: Tensor, saved: Tensor, *, save: str,
    plan: KernelPlan, need_dx: bool, w2_grad: Tensor | None, b2_grad: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """dx if it is needed; fills the gradients that `first` wants, and w2_grad and b2_grad if they are given.

    saved_post, saved: what `forward` returned.
    """
    if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
        dy = dy.contiguous()  # the expanded gradient of sum() has strides of zero
    if save == "recompute":
        # The same kernel and the same rounding as in the forward of "fast": bitwise equal gradients.
        saved_post, saved = first.hidden(x, save="slope", plan=plan)
    if b2_grad is not None:
        b2_grad.copy_(dy.sum(0, dtype=accumulator_dtype(dy.dtype)))
    post, dx = saved_post, None
    if need_dx or first.wants_gradients or save == "lean":
        dpre, recomputed = first.hidden_grad(dy, w2, saved, save="pre" if save == "lean" else "slope", plan=plan)
        post = saved_post if recomputed is None else recomputed
        if need_dx:
            dx = first.input_grad(dpre, tile=plan.fc1_dgrad)
        first.fill_weight_grad(dpre, x, tile=plan.fc1_wgrad)
        del dpre  # the largest buffer here; free it before the next product allocates its own
    if w2_grad is not None:
        products.weight_grad_into(w2_grad, dy, post, tile=plan.fc2_wgrad)
    return dx


def or_empty(x: Tensor, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """An operator returns tensors only: empty ones for gradients that are not wanted."""
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


# ---------------------------------------------------------------------------------------------- around the operator


def fake_gradients(
    x: Tensor, shapes: Sequence[Any], dtypes: Sequence[torch.dtype | None], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """What a backward operator returns, without values."""
    return or_empty(
        x, [x.new_empty(s, dtype=d) if need else None for s, d, need in zip(shapes, dtypes, needs, strict=True)]
    )


def register_autograd(name: str, forward_op: Any, backward_op: Any, tensors: int) -> None:
    """Makes backward_op the derivative of forward_op.

    Args:
        forward_op: takes `tensors` differentiable arguments, the last of which is fc2's bias, then options; returns y
            and the two tensors that `forward` saves.
        backward_op: takes dy, those arguments but fc2's bias, the two saved tensors, the options, the dtype of fc2's
            bias or None, and which gradients are needed; returns one gradient for each argument.
    """

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *kept, b2 = inputs[:tensors]
        _, saved_post, saved = output
        ctx.mark_non_differentiable(saved_post, saved)
        ctx.save_for_backward(*kept, saved_post, saved)
        ctx.options = (*inputs[tensors:], None if b2 is None else b2.dtype)

    def autograd(ctx: Any, dy: Tensor, _dpost: Tensor, _dsaved: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:tensors])
        grads = backward_op(dy, *ctx.saved_tensors, *ctx.options, needs)
        options = len(ctx.needs_input_grad) - tensors
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * options

    def no_double_backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name} has no double backward: use backend='eager' where gradients of gradients are needed"
        )

    forward_op.register_autograd(autograd, setup_context=setup_context)
    backward_op.register_autograd(no_double_backward)
