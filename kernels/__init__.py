"""Fused GELU-linear kernels for the MLP of a Vision Transformer, with shared and narrowed weights.

The package depends on torch, and on Triton where the kernels run. It can be imported and used on a machine without an
accelerator and without Triton. Must not know modules, engines or configs, nor any other package of scalevit.
"""

from scalevit.kernels.mlp import fused_mlp
from scalevit.kernels.reference import eager_mlp, reference_mlp
from scalevit.kernels.support import unsupported_reason

__all__ = ["eager_mlp", "fused_mlp", "reference_mlp", "unsupported_reason"]
