"""Fused GELU-linear kernels for the MLP of a Vision Transformer, with shared and narrowed weights.

Knows tensors, strides and devices; nothing of modules, engines or configs. Needs torch, and Triton where it
runs fused; imports and works on a machine without an accelerator and without Triton.
"""

from .mlp import fused_mlp, why_not_fused
from .reference import eager_mlp, reference_mlp

__all__ = ["eager_mlp", "fused_mlp", "reference_mlp", "why_not_fused"]
