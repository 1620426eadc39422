"""The model and how its MLPs are computed. Settings only: must not import torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from scalevit.config.base import FilePath, Section


class ModelConfig(Section):
    """The timm model that is trained."""

    name: str = "vit_base_patch16_224"
    """A model of timm's registry. Reductions need blocks with timm's Mlp, GluMlp or SwiGLU: ViT, DeiT, DINOv2, DINOv3,
    SigLIP, EVA02, BEiT, Swin and others (docs/models.md lists them). Without a reduction any without batch norms."""
    image_size: PositiveInt = 224
    """Side of the square input in pixels."""
    num_classes: PositiveInt = 1000
    """Number of classes; every label must be below it."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Stochastic depth rate of the last block; it grows linearly from 0 at the first."""
    initial_weights: FilePath | None = None
    """Weights to start from: a `.safetensors` file written by scalevit (reduced or not), or a plain timm state dict.
    Whether they are reduced already is read from the file, so they are never reduced twice."""
    kwargs: dict[str, Any] = {}
    """More arguments of the timm factory, for example {"embed_dim": 96, "depth": 6}."""


class KernelsConfig(Section):
    """How MLPs are computed."""

    mlp: Literal["auto", "triton", "eager"] = "auto"
    """auto: fused Triton kernels where they can run, else PyTorch; triton: an error otherwise; eager: PyTorch."""
    save: Literal["fast", "lean", "recompute"] = "fast"
    """What the fused forward keeps for the backward: 4, 2 or 0 bytes per hidden unit and token in bf16."""
