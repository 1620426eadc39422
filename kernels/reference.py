"""The functions that the kernels must reproduce: the MLP in eager PyTorch, and the same in fp64.

Must not import Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Name of the activation -> the `approximate` argument of torch's gelu.
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
    """The MLP as separate torch operations, on any device and dtype. Double backward is supported.

    Shapes, `width` and `activation` as in `fused_mlp`; gradients beyond `width` are exactly zero.
    """
    if width is not None and width != fc1_weight.shape[0]:
        fc1_weight = fc1_weight[:width]
        fc1_bias = None if fc1_bias is None else fc1_bias[:width]
        fc2_weight = fc2_weight[:, :width]
    hidden = F.linear(x, fc1_weight, fc1_bias)
    return F.linear(F.gelu(hidden, approximate=APPROXIMATE[activation]), fc2_weight, fc2_bias)


def reference_mlp(*tensors: Tensor | None, width: int | None = None, activation: str = "gelu") -> Tensor:
    """`eager_mlp` in fp64, whatever the dtype of the arguments: errors are measured against it.

    Args:
        tensors: x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, as in `eager_mlp`.
    """
    x, w1, b1, w2, b2 = (None if t is None else t.double() for t in tensors)
    assert x is not None
    assert w1 is not None
    assert w2 is not None
    with torch.autocast(x.device.type, enabled=False):
        return eager_mlp(x, w1, b1, w2, b2, width=width, activation=activation)
