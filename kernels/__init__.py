"""Fused kernels for the MLPs of a Vision Transformer, plain and gated, with shared and narrowed weights.

The package depends on torch, and on Triton where the kernels run. It can be imported and used on a machine without an
accelerator and without Triton. Must not know modules, engines or configs, nor any other package of scalevit.
"""

from scalevit.kernels.gated_mlp import fused_gated_mlp, fused_packed_gated_mlp
from scalevit.kernels.mlp import fused_mlp
from scalevit.kernels.reference import eager_gated_mlp, eager_mlp, eager_packed_gated_mlp, reference_mlp
from scalevit.kernels.support import unsupported_reason

__all__ = [
    "eager_gated_mlp",
    "eager_mlp",
    "eager_packed_gated_mlp",
    "fused_gated_mlp",
    "fused_mlp",
    "fused_packed_gated_mlp",
    "reference_mlp",
    "unsupported_reason",
]
