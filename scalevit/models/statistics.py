"""What a model costs: parameters, MLP parameters, multiply-accumulates. Counted on shapes alone (meta tensors)."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from scalevit.config import ModelConfig
from scalevit.models.build import build_model
from scalevit.models.reduction import ReductionConfig, mlp_blocks


@dataclass(frozen=True)
class Statistics:
    """Costs of one model; MACs are those of one image's forward pass."""

    parameters: int
    mlp_parameters: int
    unique_mlps: int
    paper_macs: int
    """As fvcore counts with fused attention, and the paper prints as "GFLOPs": linear and convolution layers,
    plus five per element of a LayerNorm; no attention matrices."""
    attention_macs: int
    """Of the two attention products, QK^T and AV."""
    matmul_macs: int
    """Of linear and convolution layers and the two attention products: what the tensor cores do."""

    @property
    def macs(self) -> int:
        """The paper's count with attention."""
        return self.paper_macs + self.attention_macs

    @property
    def training_flops(self) -> int:
        """FLOPs of one image's forward and backward: 3 passes x 2 FLOPs per MAC (recomputation not counted)."""
        return 6 * self.matmul_macs


def statistics_of(model: ModelConfig, reduction: ReductionConfig) -> Statistics:
    """Counts a configured model without building its weights.

    Raises:
        UserError: as `build_model`.
    """
    shapes = model.model_copy(update={"initial_weights": None})
    return count(build_model(shapes, reduction, seed=0, device="meta"), model.image_size)


def count(model: nn.Module, image_size: int) -> Statistics:
    """Counts parameters once and multiply-accumulates once per use.

    Args:
        model: a timm VisionTransformer with plain layers (before MLPs are fused), on the meta device.
        image_size: side of the input in pixels.

    Source: fvcore 0.1.5 `flop_count` for the paper's column; matmul counts are by definition.
    """
    linear = norm = attention = 0

    def on_linear(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal linear
        linear += output.numel() * layer.in_features

    def on_convolution(layer: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal linear
        linear += output.numel() * layer.weight[0].numel()

    def on_norm(layer: nn.LayerNorm, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal norm
        norm += 5 * output.numel()

    def on_attention(layer: Attention, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal attention
        _, tokens, _ = inputs[0].shape
        attention += 2 * tokens * tokens * layer.attn_dim

    hooks: dict[type[nn.Module], Any] = {
        nn.Linear: on_linear,
        nn.Conv2d: on_convolution,
        nn.LayerNorm: on_norm,
        Attention: on_attention,
    }
    handles = [
        module.register_forward_hook(hook)
        # A shared module runs once per block but is walked once, so it gets one hook, which fires per use.
        for module in model.modules()
        for kind, hook in hooks.items()
        if isinstance(module, kind)
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(torch.empty(1, 3, image_size, image_size, device="meta"))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()

    mlps = {id(block.mlp): block.mlp for block in mlp_blocks(model)}
    return Statistics(
        parameters=sum(p.numel() for p in model.parameters()),
        mlp_parameters=sum(p.numel() for mlp in mlps.values() for p in mlp.parameters()),
        unique_mlps=len(mlps),
        paper_macs=linear + norm,
        attention_macs=attention,
        matmul_macs=linear + attention,
    )
