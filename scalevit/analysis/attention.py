"""Where attention looks: the mean distance in pixels of each head, and maps over the patches.

Source of the distance: Dosovitskiy et al., arXiv:2010.11929, figure 7 right and appendix D.7. Knows timm's attention by
what it offers. Must not know files.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scalevit.models.mlps import transformer_blocks


@dataclass(frozen=True)
class AttentionOfBlock:
    """Of one block over some images."""

    block: int
    distances: Tensor
    """(heads,) fp64: pixels between the centres of a patch and of what it attends to, weighted by attention; the mean
    over patches and images. Attention to tokens that are no patches is left out."""
    maps: Tensor
    """(images, rows, columns): of the first images, attention of the class token to each patch, or without a class
    token the mean over patches; the mean over heads."""


def measure_attention(
    network: nn.Module, batches: Callable[[], Iterable[Tensor]], *, maps: int = 4
) -> list[AttentionOfBlock] | None:
    """Of every block whose attention is over all patches; None if timm's model does not show its patches or attention.

    Args:
        network: in evaluation mode.
        batches: of images, (b, C, H, W).
        maps: number of images whose maps are kept.
    """
    patches = getattr(network, "patch_embed", None)
    grid, size = (getattr(patches, name, None) for name in ("grid_size", "patch_size"))
    layers = {block: _attention_layers(module) for block, module in enumerate(transformer_blocks(network))}
    if grid is None or size is None or any(len(found) != 1 for found in layers.values()):
        return None
    prefix = int(getattr(network, "num_prefix_tokens", 0))
    watched = _Watched(_patch_distances(grid, size), prefix, grid, maps)
    with ExitStack() as undo, torch.no_grad():
        for block, (layer,) in layers.items():
            undo.callback(setattr, layer, "fused_attn", layer.fused_attn)
            layer.fused_attn = False  # or the weights of attention are never computed
            undo.callback(layer.attn_drop.register_forward_pre_hook(watched.hook(block)).remove)
        for images in batches():
            network(images)
    return watched.result()


def _attention_layers(block: nn.Module) -> list[Any]:
    return [layer for layer in block.modules() if hasattr(layer, "fused_attn") and hasattr(layer, "attn_drop")]


def _patch_distances(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(patches, patches) fp64: pixels between centres."""
    rows, columns = (torch.arange(count, dtype=torch.float64) * side for count, side in zip(grid, size, strict=True))
    centres = torch.cartesian_prod(rows, columns)
    return torch.cdist(centres, centres)


class _Watched:
    """Sums over images of what the blocks' attention shows."""

    def __init__(self, distances: Tensor, prefix: int, grid: tuple[int, int], maps: int) -> None:
        self._distances, self._prefix, self._grid, self._maps = distances, prefix, grid, maps
        self._totals: dict[int, Tensor] = {}
        self._images: dict[int, int] = {}
        self._kept: dict[int, list[Tensor]] = {}

    def hook(self, block: int) -> Callable[..., None]:
        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            (attention,) = arguments  # (b, heads, tokens, tokens)
            patches = len(self._distances)
            if attention.ndim != 4 or attention.shape[-1] != self._prefix + patches:
                return  # windows, or another kind of attention
            to_patches = attention[..., self._prefix :].double()
            between = to_patches[:, :, self._prefix :]
            distances = (between * self._distances.to(between)).sum(-1) / between.sum(-1)
            self._totals[block] = self._totals.get(block, 0) + distances.mean(-1).sum(0).cpu()
            self._images[block] = self._images.get(block, 0) + len(attention)
            kept = self._kept.setdefault(block, [])
            if (wanted := self._maps - sum(map(len, kept))) > 0:
                seen = to_patches[:wanted, :, 0] if self._prefix else between[:wanted].mean(2)
                kept.append(seen.mean(1).unflatten(-1, self._grid).cpu())

        return add

    def result(self) -> list[AttentionOfBlock] | None:
        found = [
            AttentionOfBlock(block, total / self._images[block], torch.cat(self._kept[block]))
            for block, total in sorted(self._totals.items())
        ]
        return found or None
