"""The arguments that `fused_mlp` and `fused_gated_mlp` accept, and where Triton can run them.

Must not know the operators or what they compute.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from scalevit.kernels.gemm import INTERPRETED

    TRITON_MISSING = ""
except ImportError as error:  # Triton is published for Linux only; the eager path needs torch only.
    INTERPRETED = False
    TRITON_MISSING = f"Triton cannot be imported ({error})"

SAVE_MODES = ("fast", "lean", "recompute")
BACKENDS = ("auto", "triton", "eager")
WIDTH_MULTIPLE = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # fp64 runs in eager PyTorch

_warned: set[str] = set()


def check_options(activation: str, activations: tuple[str, ...], save: str, backend: str) -> None:
    """Checks the arguments that are names. Raises ValueError for the first that is not valid."""
    for name, value, allowed in (
        ("activation", activation, activations), ("save", save, SAVE_MODES), ("backend", backend, BACKENDS),
    ):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def check_tensors(tensors: dict[str, Tensor | None], layers: tuple[str, ...], *, halves: int = 1) -> int:
    """Checks an operator's tensors, see there; returns the number of hidden units.

    Args:
        tensors: x first, then the weights and biases of `layers` and of fc2, by name.
        layers: the linear layers before fc2: the names of their arguments without "_weight" and "_bias".
        halves: 2 if the rows of their weights are those of a gate and of a value.

    Raises:
        TypeError, ValueError: the first tensor that is not valid, by name.
    """
    x = _check_dtypes(tensors)
    if x.dim() < 1:
        raise ValueError("x must be (..., D); got a scalar")
    d, name = x.shape[-1], f"{layers[0]}_weight"
    shapes = {key: tuple(t.shape) for key, t in tensors.items() if t is not None}
    if len(shapes[name]) != 2 or shapes[name][1] != d or shapes[name][0] % halves:
        raise ValueError(f"{name} must be ({'2 * ' * (halves == 2)}H, {d}) to match x; got {shapes[name]}")
    rows = shapes[name][0]
    hidden, w2 = rows // halves, shapes["fc2_weight"]
    for other in (f"{layer}_weight" for layer in layers[1:]):
        if shapes[other] != shapes[name]:
            raise ValueError(f"{other} must be {shapes[name]} to match {name}; got {shapes[other]}")
    if len(w2) != 2 or w2[1] != hidden:
        raise ValueError(f"fc2_weight must be (D_out, {hidden}) to match {name}; got {w2}")
    for bias, size in (*((f"{layer}_bias", rows) for layer in layers), ("fc2_bias", w2[0])):
        if shapes.get(bias, (size,)) != (size,):
            raise ValueError(f"{bias} must be ({size},) or None; got {shapes[bias]}")
    for key, size in (("x", d), (name, hidden), ("fc2_weight", w2[0])):
        if size == 0:
            raise ValueError(f"{key} has a channel dimension of 0")
    return hidden


def check_width(width: int | None, hidden: int) -> int:
    """Checks `width`; returns the number of hidden units in use."""
    if width is None:
        return hidden
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"width must be an int or None; got {type(width).__name__}")
    if width != hidden and (not 0 < width <= hidden or width % WIDTH_MULTIPLE):
        raise ValueError(f"width must be a multiple of {WIDTH_MULTIPLE} from {WIDTH_MULTIPLE} to {hidden}; got {width}")
    return width


def _check_dtypes(tensors: dict[str, Tensor | None]) -> Tensor:
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


def runs_in_triton(operator: str, x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether Triton runs this call; warns once per reason if "auto" leaves an accelerator to eager PyTorch.

    Raises:
        RuntimeError: backend is "triton" and Triton cannot run it.
    """
    if backend == "eager":
        return False
    reason = _unsupported_call_reason(x, weight)
    if reason and backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run here: {reason}")
    if reason and x.device.type not in ("cpu", "meta"):
        _warn_once(f"{operator} runs eagerly: {reason}")
    return not reason


def _is_autocast(device: torch.device) -> bool:
    # "meta" has no autocast and raises; dynamo of torch 2.11 cannot trace is_autocast_available.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the computation: autocast's where it is enabled, else x's; as in torch, fp64 is never cast."""
    if x.dtype != torch.float64 and _is_autocast(x.device):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def unsupported_reason(device: torch.device) -> str:
    """Why Triton cannot run the operators on a device, for any tensors; an empty string if it can."""
    if TRITON_MISSING:
        return TRITON_MISSING
    if device.type == "cpu" and not INTERPRETED:
        return "the tensors are on a CPU (TRITON_INTERPRET=1 interprets the kernels there, slowly)"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type!r}; Triton needs CUDA or ROCm"
    if device.type == "cuda":
        return _capability_reason(device.index or 0)
    return ""


def _unsupported_call_reason(x: Tensor, weight: Tensor) -> str:
    """Why Triton cannot run this call of an operator; an empty string if it can."""
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
def is_under_vmap() -> bool:
    """Whether this call runs under torch.vmap, alone or in a stack of transforms."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() == torch._C._functorch.TransformType.Vmap for interpreter in stack)


@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    """Warns once per process and message."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
