"""`fused_mlp`: fc1, GELU and fc2 as one differentiable operation.

The forward and the backward are two custom operators, so `torch.compile(fullgraph=True)`, activation
checkpointing, DDP, FSDP2 and ZeRO see two opaque nodes. Each puts together what `pieces.py` computes.
Nothing here knows modules, engines or configs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .reference import APPROXIMATE, eager_mlp

try:
    import triton  # noqa: F401

    from . import gelu_linear, pieces, tuning

    INTERPRETED = gelu_linear.INTERPRETED
    TRITON_MISSING = ""
except ImportError as error:  # Triton ships for Linux alone; the eager path needs no more than torch.
    INTERPRETED = False
    TRITON_MISSING = f"Triton cannot be imported ({error})"

SAVE_MODES = ("fast", "lean", "recompute")
BACKENDS = ("auto", "triton", "eager")
WIDTH_MULTIPLE = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the last in plain torch
# What linear_gelu keeps for the backward in each save mode.
_KEEPS = {"fast": "slope", "lean": "pre", "recompute": "none", "none": "none"}

_warned: set[str] = set()


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
    """fc2(gelu(fc1(x))), fused where Triton can run, the same numbers from plain torch elsewhere.

    Args:
        x: (..., D), any strides.
        fc1_weight: (H, D). fc1_bias: (H,) or None. fc2_weight: (D_out, H). fc2_bias: (D_out,) or None.
        width: use the first `width` hidden units alone, reading `fc1_weight[:width]`, `fc1_bias[:width]` and
            `fc2_weight[:, :width]` in place; their gradients beyond it are exactly zero. A multiple of 16, at
            most H. None means H, whatever H is.
        activation: "gelu" (exact, erf) or "gelu_tanh".
        save: what is kept for the backward besides x, in bytes per token for 2-byte dtypes: "fast" gelu and
            gelu' (4 * width), "lean" the pre-activation (2 * width), "recompute" nothing. "fast" and
            "recompute" give the same bits; "lean" rounds the pre-activation once more, as eager does.
        backend: "auto" runs Triton where it can and plain torch elsewhere: silently on a CPU, with one warning
            that says why on an accelerator. "triton" raises where it cannot; "eager" is plain torch.

    Returns:
        (..., D_out), in x's dtype, or autocast's.

    Dtypes: fp32, bf16, fp16, all arguments alike. Under autocast the arguments may differ: x is cast, the
    weights are cast where they are read, and their gradients come in their own dtype, rounded once.

    Shared weights: each use contributes one gradient in the weight's dtype, and autograd adds them up. An
    engine that wants those sums in fp32 for narrower weights sets `parameter.grad_dtype = torch.float32`
    (torch 2.11 and later): the op then emits the fp32 accumulators of its matrix products for that
    parameter, and autograd adds and stores them in fp32, through the ordinary hooks, so DDP, FSDP and ZeRO
    still see every gradient. Under torch.compile each use's gradient still comes rounded to the weight's
    dtype; only their sum is fp32.

    Double backward is not supported and raises. Under forward-mode differentiation and torch.func.grad it runs
    as plain torch with backend="auto", and raises with "triton". Deterministic: the same inputs give the same bits.

    Raises:
        TypeError: an argument is not a tensor of a supported dtype, or dtypes differ without autocast.
        ValueError: shapes, devices, width, activation, save or backend do not fit; it names the argument.
        RuntimeError: backend="triton" where Triton cannot run these tensors.

    Source: the exact and tanh GELU of arXiv:1606.08415; narrowing and sharing of arXiv:2512.01059.
    """
    _check(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, width, activation, save, backend)
    width = fc1_weight.shape[0] if width is None else width
    if backend != "eager":
        reason = _why_not(x, fc1_weight)
        if reason and backend == "triton":
            raise RuntimeError(f"backend='triton' cannot run here: {reason}")
        if reason and x.device.type not in ("cpu", "meta"):
            _warn_once(reason)
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
    dtype = _compute_dtype(x)
    if x.dtype != dtype:
        x = x.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        # Activations may be copied (weights never): both GEMMs that read x want its channels adjacent.
        rows = rows.contiguous()
    tensors = (x, w1, b1, w2, b2)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        save = "none"
    wide = (_wants_fp32_grad(w1), _wants_fp32_grad(w2))
    y, _, _ = torch.ops.scalevit.fused_mlp(rows, w1, b1, w2, b2, width, activation, save, *wide)
    # The rows die here, so that this need not be a view of them to autograd: FSDP2 hooks the output of a module,
    # and an addition in place to a view loses the hook.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], w2.shape[0]))


def _autocasts(device: torch.device) -> bool:
    # "meta" has no autocast and does not answer; dynamo of torch 2.11 cannot trace is_autocast_available.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _compute_dtype(x: Tensor) -> torch.dtype:
    # Like torch's own autocast, which leaves fp64 alone.
    if x.dtype != torch.float64 and _autocasts(x.device):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _wants_fp32_grad(weight: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # dynamo cannot trace grad_dtype (torch 2.11 to 2.15)
    return weight.is_leaf and weight.dtype != torch.float32 and weight.grad_dtype == torch.float32


# ------------------------------------------------------------------------------------- arguments and support


def _check(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    width: int | None, activation: str, save: str, backend: str,
) -> None:  # fmt: skip
    for name, value, allowed in (
        ("activation", activation, tuple(APPROXIMATE)), ("save", save, SAVE_MODES),
        ("backend", backend, BACKENDS),
    ):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    named = {"x": x, "fc1_weight": w1, "fc1_bias": b1, "fc2_weight": w2, "fc2_bias": b2}
    for name, t in named.items():
        if t is None and name.endswith("bias"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64; got {t.dtype}")
        if t.dtype != x.dtype and not _autocasts(x.device):
            raise TypeError(f"{name} is {t.dtype} and x is {x.dtype}: all must be alike (or use torch.autocast)")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} and x on {x.device}")
    if x.dim() < 1:
        raise ValueError("x must be (..., D); got a scalar")
    if w1.dim() != 2 or w1.shape[1] != x.shape[-1]:
        raise ValueError(f"fc1_weight must be (H, {x.shape[-1]}) to fit x; got {tuple(w1.shape)}")
    hidden = w1.shape[0]
    if w2.dim() != 2 or w2.shape[1] != hidden:
        raise ValueError(f"fc2_weight must be (D_out, {hidden}) to fit fc1_weight; got {tuple(w2.shape)}")
    for name, bias, size in (("fc1_bias", b1, hidden), ("fc2_bias", b2, w2.shape[0])):
        if bias is not None and tuple(bias.shape) != (size,):
            raise ValueError(f"{name} must be ({size},) or None; got {tuple(bias.shape)}")
    for name, size in (("x", x.shape[-1]), ("fc1_weight", hidden), ("fc2_weight", w2.shape[0])):
        if size == 0:
            raise ValueError(f"{name} has a channel dimension of 0")
    if width is not None and (isinstance(width, bool) or not isinstance(width, int)):
        raise TypeError(f"width must be an int or None; got {type(width).__name__}")
    if width not in (None, hidden) and (not 0 < width <= hidden or width % WIDTH_MULTIPLE):
        raise ValueError(f"width must be a multiple of {WIDTH_MULTIPLE} from {WIDTH_MULTIPLE} to {hidden}; got {width}")


def why_not_fused(device: torch.device) -> str:
    """Why Triton cannot run `fused_mlp` on a device, whatever the tensors, or an empty string."""
    if TRITON_MISSING:
        return TRITON_MISSING
    if device.type == "cpu" and not INTERPRETED:
        return "the tensors are on a CPU (TRITON_INTERPRET=1 runs the kernels there, slowly)"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type!r}; Triton needs CUDA or ROCm"
    if device.type == "cuda":
        return _device_why_not(device.index or 0)
    return ""


def _why_not(x: Tensor, weight: Tensor) -> str:
    """Why Triton cannot run these tensors, or an empty string."""
    reason = why_not_fused(x.device)
    if reason:
        return reason
    dtype = _compute_dtype(x)
    if type(x).__name__ == "DTensor" or type(weight).__name__ == "DTensor":
        return "DTensors (tensor parallelism) have no sharding rule here"
    supported = [torch.float32, torch.bfloat16, torch.float16]
    if INTERPRETED:
        supported.append(torch.float64)
    if dtype not in supported:
        return f"{dtype} has no kernel; fp32, bf16 and fp16 have"
    transform = _transform()
    if transform:
        return f"{transform} is not supported: only backward(), torch.autograd.grad and torch.func.vmap are"
    return ""


@torch.compiler.assume_constant_result
def _transform() -> str:
    """What this call runs under that would see no derivative of the op, or see it as zero; else an empty string."""
    # Dynamo guards on both the dual level and the stack of transforms, so the answer may be taken for constant.
    for interpreter in torch._C._functorch.get_interpreter_stack() or ():
        if interpreter.key() == torch._C._functorch.TransformType.Grad:
            return "a gradient transform of torch.func (grad, vjp, jacrev, hessian)"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad)"
    return ""


@torch.compiler.assume_constant_result
def _device_why_not(index: int) -> str:
    if torch.version.hip:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    return "" if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


@torch.compiler.assume_constant_result
def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"fused_mlp runs eagerly: {reason}", RuntimeWarning, stacklevel=4)


# ---------------------------------------------------------------------------------------------- operators


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """Autocast off (the dtypes are settled), and the tensors' device current, where Triton launches."""
    on = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.autocast(device.type, enabled=False), on:
        yield


@torch.library.custom_op("scalevit::fused_mlp", mutates_args=())
def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    width: int, activation: str, save: str, wide1: bool, wide2: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x (M, D) -> y (M, D_out) and what the backward needs: (post, slope), (pre, -) or (-, -); - is empty.

    The dtype of x is the one computed in; weights of another dtype are cast as they are read. wide1 and wide2
    ask for fp32 weight gradients; the forward only hands them to the backward.
    """
    with _plainly(x.device):
        w1, b1, w2 = _narrow(x, width, w1, b1, w2)
        plan = tuning.find_plan(x, width, save)
        post, saved = pieces.hidden(x, w1, b1, activation=activation, save=_KEEPS[save], plan=plan)
        y = pieces.linear(post, w2, None if b2 is None else b2.to(x.dtype).contiguous(), tile=plan.fc2)
        if save == "fast":
            return y, post, saved
        return y, saved, x.new_empty(0)  # lean: pre; else empty


@_forward.register_fake
def _(x, w1, b1, w2, b2, width, activation, save, wide1, wide2):
    kept = (x.shape[0], width)
    return (
        x.new_empty(x.shape[0], w2.shape[0]),
        x.new_empty(kept if save in ("fast", "lean") else 0),
        x.new_empty(kept if save == "fast" else 0),
    )


@torch.library.custom_op("scalevit::fused_mlp_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, saved_a: Tensor, saved_b: Tensor,
    width: int, activation: str, save: str, wide1: bool, wide2: bool,
    b2_dtype: torch.dtype | None, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, w1, b1, w2, b2; the ones not in `needs` come back empty."""
    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    dx, dw1, db1, dw2, db2 = (x.new_empty(0) for _ in range(5))
    with _plainly(x.device):
        plan = tuning.find_plan(x, width, save)
        w1h, b1h, w2h = _narrow(x, width, w1, b1, w2)
        if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
            dy = dy.contiguous()  # the expanded gradient of sum() has strides of zero
        if save == "recompute":
            # The same kernel and the same rounding as in the forward: the bits of "fast".
            saved_a, saved_b = pieces.hidden(x, w1h, b1h, activation=activation, save="slope", plan=plan)
        if need_b2 and b2_dtype is not None:
            db2 = dy.sum(0, dtype=pieces.wide_dtype(dy)).to(b2_dtype)
        post, slope = saved_a, saved_b
        if need_x or need_w1 or need_b1 or save == "lean":
            bias_out = None
            keeps, saved = ("pre", saved_a) if save == "lean" else ("slope", slope)
            if need_b1 and b1 is not None:
                db1, bias_out = _gradient(b1, width, 0, wide=False)
            dpre, again = pieces.hidden_grad(
                dy, w2h, saved, activation=activation, save=keeps, bias_out=bias_out, plan=plan
            )
            post = post if again is None else again
            if need_x:
                dx = pieces.input_grad(dpre, w1h, tile=plan.fc1_dgrad)
            if need_w1:
                dw1, part = _gradient(w1, width, 0, wide1)
                pieces.weight_grad_into(part, dpre, x, tile=plan.fc1_wgrad)
            del dpre  # the largest buffer here, dead before the next product needs its own
        if need_w2:
            dw2, part = _gradient(w2, width, 1, wide2)
            pieces.weight_grad_into(part, dy, post, tile=plan.fc2_wgrad)
    return dx, dw1, db1, dw2, db2


@_backward.register_fake
def _(dy, x, w1, b1, w2, saved_a, saved_b, width, activation, save, wide1, wide2, b2_dtype, needs):
    shapes = (x.shape, w1.shape, b1 if b1 is None else b1.shape, w2.shape, (dy.shape[1],))
    dtypes = (
        x.dtype,
        torch.float32 if wide1 else w1.dtype,
        None if b1 is None else b1.dtype,
        torch.float32 if wide2 else w2.dtype,
        b2_dtype,
    )
    return tuple(
        x.new_empty(shape, dtype=d) if need else x.new_empty(0)
        for shape, d, need in zip(shapes, dtypes, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, w1, b1, w2, b2, width, activation, save, wide1, wide2 = inputs
    _, saved_a, saved_b = output
    ctx.mark_non_differentiable(saved_a, saved_b)
    ctx.save_for_backward(x, w1, b1, w2, saved_a, saved_b)
    ctx.options = (width, activation, save, wide1, wide2, None if b2 is None else b2.dtype)


def _autograd(ctx, dy, _da, _db):
    x, w1, b1, w2, saved_a, saved_b = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    grads = torch.ops.scalevit.fused_mlp_backward(dy, x, w1, b1, w2, saved_a, saved_b, *ctx.options, needs)
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


def _gradient(like: Tensor, width: int, dim: int, wide: bool) -> tuple[Tensor, Tensor]:
    """A gradient for `like` with zeros beyond `width`, and the view of it that is still to be filled."""
    out = torch.empty(like.shape, dtype=torch.float32 if wide else like.dtype, device=like.device)
    out.narrow(dim, width, like.shape[dim] - width).zero_()
    return out, out.narrow(dim, 0, width)
