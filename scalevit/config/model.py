"""The model and how its MLPs are computed."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from scalevit.config.base import FilePath, Section


class ModelConfig(Section):
    """Which timm Vision Transformer is trained."""

    name: str = "vit_base_patch16_224"
    """A model of timm's registry whose blocks carry timm's Mlp (ViT, DeiT III, DINOv2-like)."""
    image_size: PositiveInt = 224
    """Side of the square input in pixels."""
    num_classes: PositiveInt = 1000
    """Number of classes; every label must be below it."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Stochastic depth rate of the last block; it grows linearly from 0 at the first."""
    initial_weights: FilePath | None = None
    """A `model.safetensors` (ours, reduced or not) or a plain timm state dict to start from. Whether it is already
    reduced is read from the file, so it is never reduced twice."""
    kwargs: dict[str, Any] = {}
    """More arguments of the timm factory, for example {"embed_dim": 96, "depth": 6}."""


class KernelsConfig(Section):
    """How the MLPs are computed."""

    mlp: Literal["auto", "triton", "eager"] = "auto"
    """auto: fused Triton kernels where they run, else PyTorch; triton: fail where they do not; eager: PyTorch."""
    save: Literal["fast", "lean", "recompute"] = "fast"
    """What the fused forward keeps for the backward: 4, 2 or 0 bytes per hidden unit and token in bf16."""
