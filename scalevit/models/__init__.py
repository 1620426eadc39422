"""Reduced Vision Transformers: built by timm, reduced, fused. Knows timm and the kernels, not engines or data."""

from scalevit.models import registry as registry
from scalevit.models.build import build_model
from scalevit.models.fused_mlp import FusedMlp, fuse_mlps
from scalevit.models.initial_values import initial_values
from scalevit.models.reduction import mlp_blocks, reduce_model
from scalevit.models.weights import save_weights

__all__ = ["FusedMlp", "build_model", "fuse_mlps", "initial_values", "mlp_blocks", "reduce_model", "save_weights"]
