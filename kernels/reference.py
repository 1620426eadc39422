"""The functions that the kernels must reproduce: plain and gated MLPs in eager PyTorch, and the same in fp64.

Must not import Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

# Name of the activation -> the `approximate` argument of torch's gelu.
APPROXIMATE: dict[str, str] = {"gelu": "none", "gelu_tanh": "tanh"}
# The activations of a gate: SwiGLU's and GEGLU's (arXiv:2002.05202).
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, **{name: partial(F.gelu, approximate=kind) for name, kind in APPROXIMATE.items()}
}  # fmt: skip


def eager_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    width: int | None = None,
    activation: str = "gelu",
) -> Tensor:
    """The MLP as separate torch operations, on any device and dtype. Double backward is supported.

    Shapes, `width` and `activation` as in `fused_mlp`; gradients beyond `width` are exactly zero.
    """
    if width is not None and width != fc1_weight.shape[0]:
        fc1_weight = fc1_weight[:width]
        fc1_bias = None if fc1_bias is None else fc1_bias[:width]
        fc2_weight = fc2_weight[:, :width]
    hidden = F.linear(x, fc1_weight, fc1_bias)
    return F.linear(F.gelu(hidden, approximate=APPROXIMATE[activation]), fc2_weight, fc2_bias)


def eager_gated_mlp(
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
) -> Tensor:
    """The gated MLP as separate torch operations, on any device and dtype. Double backward is supported.

    Arguments as in `fused_gated_mlp`; gradients beyond `width` are exactly zero.
    """
    if width is not None and width != gate_weight.shape[0]:
        gate_weight, value_weight = gate_weight[:width], value_weight[:width]
        gate_bias, value_bias = (None if b is None else b[:width] for b in (gate_bias, value_bias))
        fc2_weight = fc2_weight[:, :width]
    gate = F.linear(x, gate_weight, gate_bias)
    return F.linear(GATES[activation](gate) * F.linear(x, value_weight, value_bias), fc2_weight, fc2_bias)


def eager_packed_gated_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    gate_last: bool = False,
    width: int | None = None,
    activation: str = "silu",
) -> Tensor:
    """The same with gate and value in one weight, as in `fused_packed_gated_mlp`."""
    half = fc1_weight.shape[0] // 2
    if width is not None and width != half:
        weights = fc1_weight.split(half)
        biases = (None, None) if fc1_bias is None else fc1_bias.split(half)
        gate, value = (1, 0) if gate_last else (0, 1)
        return eager_gated_mlp(
            x, weights[gate], biases[gate], weights[value], biases[value], fc2_weight, fc2_bias,
            width=width, activation=activation,
        )  # fmt: skip
    first, second = F.linear(x, fc1_weight, fc1_bias).split(half, -1)
    hidden = first * GATES[activation](second) if gate_last else GATES[activation](first) * second
    return F.linear(hidden, fc2_weight, fc2_bias)


def reference_mlp(*tensors: Tensor | None, width: int | None = None, activation: str = "gelu") -> Tensor:
    """`eager_mlp` in fp64, whatever the dtype of the arguments: errors are measured against it.

    Args:
        tensors: x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, as in `eager_mlp`.
    """
    return in_fp64(eager_mlp, *tensors, width=width, activation=activation)


def in_fp64(function: Callable[..., Tensor], *tensors: Tensor | None, **options: object) -> Tensor:
    """The result of one of the functions above for its tensors in fp64, without autocast."""
    x, *parameters = (None if t is None else t.double() for t in tensors)
    assert x is not None
    with torch.autocast(x.device.type, enabled=False):
        return function(x, *parameters, **options)
