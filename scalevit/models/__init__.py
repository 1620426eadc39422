"""Reduced Vision Transformers: built by timm, reduced, fused. Knows timm and the kernels, not engines or data."""
