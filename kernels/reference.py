"""What the kernels must compute: the eager MLP, and the same in fp64. Plain torch; no Triton."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["gelu", "gelu_tanh"]

# Name of our activation -> the `approximate` argument of torch's gelu.
APPROXIMATE: dict[str, str] = {"gelu": "none", "gelu_tanh": "tanh"}


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
    """The MLP as separate torch operations, on any device and dtype, differentiable any number of times.

    Shapes and `width` as in `scalevit.kernels.fused_mlp`; gradients beyond `width` are exactly zero.
    """
    if width is not None and width != fc1_weight.shape[0]:
        fc1_weight = fc1_weight[:width]
        fc1_bias = None if fc1_bias is None else fc1_bias[:width]
        fc2_weight = fc2_weight[:, :width]
    hidden = F.linear(x, fc1_weight, fc1_bias)
    return F.linear(F.gelu(hidden, approximate=APPROXIMATE[activation]), fc2_weight, fc2_bias)


def reference_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    width: int | None = None,
    activation: str = "gelu",
) -> Tensor:
    """The MLP in fp64, whatever the dtype of the arguments: the truth that errors are measured against."""
    args = [None if t is None else t.double() for t in (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)]
    with torch.autocast(x.device.type, enabled=False):
        return eager_mlp(*args, width=width, activation=activation)  # type: ignore[arg-type]
