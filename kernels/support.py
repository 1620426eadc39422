"""The arguments that `fused_mlp` accepts, and where Triton can run them.

Must not know the operators or what they compute.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

from scalevit.kernels.reference import APPROXIMATE

try:
    from scalevit.kernels.gelu_linear import INTERPRETED

    TRITON_MISSING = ""
except ImportError as error:  # Triton is published for Linux only; the eager path needs torch only.
    INTERPRETED = False
    TRITON_MISSING = f"Triton cannot be imported ({error})"

SAVE_MODES = ("fast", "lean", "recompute")
BACKENDS = ("auto", "triton", "eager")
WIDTH_MULTIPLE = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # fp64 runs in eager PyTorch

_warned: set[str] = set()


def check_arguments(
    tensors: dict[str, Tensor | None], width: int | None, activation: str, save: str, backend: str
) -> None:
    """Checks the arguments of `fused_mlp`, see there.

    Args:
        tensors: x, fc1_weight, fc1_bias, fc2_weight and fc2_bias by name.

    Raises:
        TypeError, ValueError: the first argument that is not valid, by name.
    """
    for name, value, allowed in (
        ("activation", activation, tuple(APPROXIMATE)), ("save", save, SAVE_MODES),
        ("backend", backend, BACKENDS),
    ):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    x = _check_tensors(tensors)
    w1, w2 = tensors["fc1_weight"], tensors["fc2_weight"]
    assert w1 is not None
    assert w2 is not None
    if x.dim() < 1:
        raise ValueError("x must be (..., D); got a scalar")
    if w1.dim() != 2 or w1.shape[1] != x.shape[-1]:
        raise ValueError(f"fc1_weight must be (H, {x.shape[-1]}) to match x; got {tuple(w1.shape)}")
    hidden = w1.shape[0]
    if w2.dim() != 2 or w2.shape[1] != hidden:
        raise ValueError(f"fc2_weight must be (D_out, {hidden}) to match fc1_weight; got {tuple(w2.shape)}")
    for name, size in (("fc1_bias", hidden), ("fc2_bias", w2.shape[0])):
        bias = tensors[name]
        if bias is not None and tuple(bias.shape) != (size,):
            raise ValueError(f"{name} must be ({size},) or None; got {tuple(bias.shape)}")
    for name, size in (("x", x.shape[-1]), ("fc1_weight", hidden), ("fc2_weight", w2.shape[0])):
        if size == 0:
            raise ValueError(f"{name} has a channel dimension of 0")
    if width is not None and (isinstance(width, bool) or not isinstance(width, int)):
        raise TypeError(f"width must be an int or None; got {type(width).__name__}")
    if width not in (None, hidden) and (not 0 < width <= hidden or width % WIDTH_MULTIPLE):
        raise ValueError(f"width must be a multiple of {WIDTH_MULTIPLE} from {WIDTH_MULTIPLE} to {hidden}; got {width}")


def _check_tensors(tensors: dict[str, Tensor | None]) -> Tensor:
    """Checks types, dtypes and devices; returns x."""
    x = tensors["x"]
    for name, t in tensors.items():
        if t is None and name.endswith("bias"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(t).__name__}")
        assert x is not None  # the first one checked
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64; got {t.dtype}")
        if t.dtype != x.dtype and not _is_autocast(x.device):
            raise TypeError(f"{name} is {t.dtype} and x is {x.dtype}: outside torch.autocast the dtypes must be equal")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} and x on {x.device}")
    assert x is not None
    return x


def _is_autocast(device: torch.device) -> bool:
    # "meta" has no autocast and raises; dynamo of torch 2.11 cannot trace is_autocast_available.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the computation: autocast's where it is enabled, else x's; as in torch, fp64 is never cast."""
    if x.dtype != torch.float64 and _is_autocast(x.device):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def unsupported_reason(device: torch.device) -> str:
    """Why Triton cannot run `fused_mlp` on a device, for any tensors; an empty string if it can."""
    if TRITON_MISSING:
        return TRITON_MISSING
    if device.type == "cpu" and not INTERPRETED:
        return "the tensors are on a CPU (TRITON_INTERPRET=1 interprets the kernels there, slowly)"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type!r}; Triton needs CUDA or ROCm"
    if device.type == "cuda":
        return _capability_reason(device.index or 0)
    return ""


def unsupported_call_reason(x: Tensor, weight: Tensor) -> str:
    """Why Triton cannot run this call of `fused_mlp`; an empty string if it can."""
    reason = unsupported_reason(x.device)
    if reason:
        return reason
    dtype = compute_dtype(x)
    if type(x).__name__ == "DTensor" or type(weight).__name__ == "DTensor":
        return "DTensors (tensor parallelism) are not supported: the operator has no sharding rule"
    supported = [torch.float32, torch.bfloat16, torch.float16]
    if INTERPRETED:
        supported.append(torch.float64)
    if dtype not in supported:
        return f"{dtype} has no kernel; fp32, bf16 and fp16 have"
    transform = _active_transform()
    if transform:
        return f"{transform} is not supported: only backward(), torch.autograd.grad and torch.func.vmap are"
    return ""


@torch.compiler.assume_constant_result
def _active_transform() -> str:
    """The transform that this call runs under and that would take the operator's derivative for zero, or ""."""
    # Dynamo guards on the dual level and on the stack of transforms, so the result can be treated as a constant.
    for interpreter in torch._C._functorch.get_interpreter_stack() or ():
        if interpreter.key() == torch._C._functorch.TransformType.Grad:
            return "a gradient transform of torch.func (grad, vjp, jacrev, hessian)"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad)"
    return ""


@torch.compiler.assume_constant_result
def _capability_reason(index: int) -> str:
    if torch.version.hip:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    return "" if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


@torch.compiler.assume_constant_result
def warn_once(reason: str) -> None:
    """Warns that `fused_mlp` runs eagerly, once per process and reason."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"fused_mlp runs eagerly: {reason}", RuntimeWarning, stacklevel=4)
