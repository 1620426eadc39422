"""What a model costs: parameters, MLP parameters, multiply-accumulates. Counted on shapes (meta tensors).

Knows layers and torch's FLOP counter. Must not know engines or devices.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scalevit.config.model import ModelConfig
from scalevit.errors import SettingError, settings_of
from scalevit.models.build import build_model
from scalevit.models.mlps import NoMlp, mlp_places, transformer_blocks
from scalevit.models.reductions.base import Reduction

# Products with weights; what else torch counts (batched products, scaled_dot_product_attention) is attention.
_LINEAR = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution}


@dataclass(frozen=True)
class ModelCosts:
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


def model_costs(model: ModelConfig, reduction: Reduction) -> ModelCosts:
    """Counts a configured model without building its weights.

    Raises:
        SettingError: as `build_model`, or the model cannot process images of its size.
        UserError: as `build_model`.
    """
    shapes = model.without_weights()
    network = build_model(shapes, reduction, seed=0, device="meta")
    with settings_of("model"):
        return count_costs(network, model.image_size, in_chans=model.in_chans)


def count_costs(module: nn.Module, image_size: int, *, in_chans: int = 3) -> ModelCosts:
    """Counts parameters once and multiply-accumulates once per use. The module is left as it is.

    Args:
        module: a timm Vision Transformer with plain layers (before MLPs are fused), on the meta device.
        image_size: side of the input in pixels.
        in_chans: channels of the input.

    Raises:
        SettingError: the model cannot process such images.

    Source: torch's FlopCounterMode for products; fvcore 0.1.5 `flop_count` for what the paper's column adds.
    """
    # Without gradients: the counter fails where a parameter itself is a module's input (attention pooling).
    counted = copy.deepcopy(module).requires_grad_(False).eval()
    norm_elements = 0

    def on_norm(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal norm_elements
        norm_elements += output.numel()

    for layer in counted.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.register_forward_hook(on_norm)
    try:
        with FlopCounterMode(display=False) as counter:
            counted(torch.empty(1, in_chans, image_size, image_size, device="meta"))
    except Exception as error:
        # Shapes that do not fit together fail in whatever layer meets them first.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SettingError(
            "image_size", image_size, f"the model cannot process images of this size ({reason[:200]})"
        ) from error
    flops = counter.get_flop_counts()["Global"]
    linear = sum(count for operation, count in flops.items() if operation in _LINEAR) // 2
    attention = sum(count for operation, count in flops.items() if operation not in _LINEAR) // 2

    places = [place for block in transformer_blocks(module) for place in mlp_places(block)]
    mlps = {place.module for place in places if not isinstance(place.module, NoMlp)}
    return ModelCosts(
        parameters=sum(p.numel() for p in module.parameters()),
        mlp_parameters=sum(p.numel() for mlp in mlps for p in mlp.parameters()),
        unique_mlps=len(mlps),
        paper_macs=linear + 5 * norm_elements,
        attention_macs=attention,
        matmul_macs=linear + attention,
    )
