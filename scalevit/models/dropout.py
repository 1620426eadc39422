"""Drop-path and dropout whose masks follow from keys of the rows, and not from a generator's state.

timm's layers draw from torch's generator, so a mask depends on the micro-batch, and on what the compiler or a
recomputation does. Here the keys are drawn outside and handed to the layers before a forward pass: eager, compiled,
recomputed and fused blocks use the same masks. Knows layers; must not know steps, ranks or engines.
"""

import copy
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices, RelPosMlp
from torch import Tensor, nn

from scalevit.errors import UserError
from scalevit.models.mlps import mlp_places, transformer_blocks
from scalevit.randomness import Purpose, mix64, row_keys, uniforms

_MULTIPLIER = 0x9E3779B1
_MASK = 0xFFFFFFFF


class RowDropPath(nn.Module):
    """timm's DropPath: the residual branch of a dropped row is zero, that of the others is divided by their share."""

    def __init__(self, layer: DropPath):
        super().__init__()
        self.drop_prob, self.scale_by_keep = layer.drop_prob, layer.scale_by_keep
        self.factors: Tensor | None = None
        """(b,) float32, of the next forward pass."""

    def set_keys(self, keys: np.ndarray, device: torch.device) -> None:
        """keys: (b,) uint64, of this layer's draws."""
        kept = uniforms(keys, 1)[:, 0] >= self.drop_prob
        scale = 1.0 / (1.0 - self.drop_prob) if self.scale_by_keep else 1.0
        self.factors = torch.from_numpy((kept * scale).astype(np.float32)).to(device, non_blocking=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, ...) -> the same shape."""
        if not self.training:
            return x
        assert self.factors is not None, "RowKeys.set comes before a forward pass in training"
        if len(x) != len(self.factors):
            raise UserError("model: its drop-path drops parts of images, which is not supported: use model.drop_path=0")
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class _KeyedLayer(nn.Module):
    """A layer that hashes its rows' keys on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None

    def set_keys(self, keys: np.ndarray, device: torch.device) -> None:
        """keys: (b,) uint64, of this layer's draws."""
        self.keys = torch.from_numpy((keys >> np.uint64(32)).astype(np.int64)).to(device, non_blocking=True)

    def _uniforms(self, shape: torch.Size) -> Tensor:
        """shape: (b, ...), of each row's numbers -> float32 in [0, 1), multiples of 2^-24."""
        assert self.keys is not None, "RowKeys.set comes before a forward pass in training"
        counters = torch.arange(shape[1:].numel(), device=self.keys.device)
        # Two rounds of a 32-bit finaliser (Wellons' lowbias32), in 64-bit integers, whose shifts are then logical.
        bits = (self.keys[:, None] ^ (counters * _MULTIPLIER & _MASK)[None, :]) & _MASK
        for _ in range(2):
            bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _MASK
            bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & _MASK
            bits = bits ^ (bits >> 16)
        return ((bits >> 8).to(torch.float32) * 2.0**-24).view(shape)


class RowDropout(_KeyedLayer):
    """torch's Dropout: each element is zero with probability p, the others are divided by 1 - p."""

    def __init__(self, layer: nn.Dropout):
        super().__init__()
        self.p = layer.p

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, ...) -> the same shape."""
        if not self.training:
            return x
        return x * ((self._uniforms(x.shape) >= self.p).to(x.dtype) / (1.0 - self.p))


class StepDropout(RowDropout):
    """torch's Dropout of what all rows have in common, as position biases are: one mask for all rows of a step."""

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape -> the same shape."""
        return super().forward(x[None])[0]


class RowPatchDropout(_KeyedLayer):
    """timm's PatchDropout: each row keeps the same number of its patches, and all prefix tokens.

    Models with rotary embeddings have PatchDropoutWithIndices, which returns the kept places too.
    """

    def __init__(self, layer: PatchDropout | PatchDropoutWithIndices):
        super().__init__()
        self.with_indices = isinstance(layer, PatchDropoutWithIndices)
        self.prob, self.num_prefix_tokens, self.ordered = layer.prob, layer.num_prefix_tokens, layer.ordered

    def forward(self, x: Tensor) -> Any:
        """x: (b, prefix + patches, D) -> (b, prefix + kept patches, D), and their places (b, kept) if wanted."""
        if not self.training:
            return (x, None) if self.with_indices else x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        kept = max(1, int(patches.shape[1] * (1.0 - self.prob)))
        places = self._uniforms(patches.shape[:2]).argsort(dim=1, stable=True)[:, :kept]
        if self.ordered:
            places = places.sort(dim=1).values
        kept_tokens = torch.cat([prefix, patches.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))], dim=1)
        return (kept_tokens, places) if self.with_indices else kept_tokens


_ROW_LAYERS = (RowDropPath, RowDropout, RowPatchDropout)


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Gives every residual branch of a timm model this drop-path rate, in place.

    timm's rates grow with the depth; a branch with rate 0 has `Identity` in the place of the layer.
    """
    for module in list(model.modules()):
        for name, _ in list(module.named_children()):
            if name.startswith("drop_path"):
                setattr(module, name, DropPath(rate))


def use_row_keys(model: nn.Module) -> None:
    """Replaces every drop-path and dropout layer of a timm model that does something, in place.

    Blocks that share an MLP with dropout get MLP modules of their own around the same layers, so that each block has
    its own mask. Parameters and their names stay as they are.
    """
    for block in transformer_blocks(model):
        for place in mlp_places(block):
            if any(_replacement(layer) is not None for layer in place.module.children()):
                mlp = copy.copy(place.module)
                mlp._modules = dict(place.module._modules)
                place.put(mlp)
    shared = {module for biases in model.modules() if isinstance(biases, RelPosMlp) for module in biases.modules()}
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            replacement = _replacement(layer)
            if replacement is None:
                continue
            if module in shared and isinstance(layer, nn.Dropout):
                replacement = StepDropout(layer)
            if name == "attn_drop" and hasattr(module, "fused_attn"):
                vars(module)["fused_attn"] = False  # torch's fused attention draws its own mask
            setattr(module, name, replacement)


def _replacement(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, DropPath) and layer.drop_prob > 0:
        return RowDropPath(layer)
    if isinstance(layer, PatchDropout | PatchDropoutWithIndices) and layer.prob > 0:
        return RowPatchDropout(layer)
    return RowDropout(layer) if isinstance(layer, nn.Dropout) and layer.p > 0 else None


class RowKeys:
    """Hands keys of rows to the layers of a model that `use_row_keys` has prepared."""

    def __init__(self, model: nn.Module):
        self._layers: list[Any] = [module for module in model.modules() if isinstance(module, _ROW_LAYERS)]

    def set(self, seed: int, step: int, rows: np.ndarray, device: torch.device) -> None:
        """Before each forward pass in training.

        Args:
            seed: of the run.
            step: number of the optimizer step.
            rows: (b,) int64, numbers in the global batch of the rows of the next forward pass.
            device: of the model.
        """
        of_rows = row_keys(seed, Purpose.DROPPING, step, rows)
        of_step = row_keys(seed, Purpose.STEP_DROPPING, step, np.zeros(1, np.int64))
        for place, layer in enumerate(self._layers):
            keys = of_step if isinstance(layer, StepDropout) else of_rows
            layer.set_keys(mix64(keys ^ np.uint64(place + 1)), device)
