"""Parameter reduction of a timm Vision Transformer: GroupedMLP, ShallowMLP, ThinMLP.

Source: "Parameter Reduction Improves Vision Transformers: A Comparative Study of Sharing and Width
Reduction" (arXiv:2512.01059). Grouped and shallow change a model that is built and initialised, so with the
same seed everything that is not an MLP keeps the baseline's values bit for bit; thin changes the arguments
of the factory, and with them every later draw of the initialisation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from scalevit.errors import UserError
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.models.reductions.thin import ThinReduction


def factory_arguments(reduction: Reduction, given: dict[str, Any]) -> dict[str, Any]:
    """What a reduction adds to the timm factory's arguments (only thin adds any: `mlp_ratio`).

    Raises:
        UserError: the user's own arguments set the same value.
    """
    if not isinstance(reduction, ThinReduction):
        return {}
    if "mlp_ratio" in given:
        raise UserError(
            f"config: model.kwargs.mlp_ratio = {given['mlp_ratio']} and reduction.mlp_ratio = {reduction.mlp_ratio} "
            "set the same width: keep one of them"
        )
    return {"mlp_ratio": reduction.mlp_ratio}


def reduce_model(model: nn.Module, reduction: Reduction) -> nn.Module:
    """Applies grouped or shallow to a built model, in place; none and thin (which only is checked) leave it as it is.

    Args:
        model: a timm VisionTransformer; `model.blocks[i].mlp` must be timm's `Mlp`.

    Returns:
        The same model.

    Raises:
        UserError: the model has no such blocks, the grouping does not fit its depth, or no hidden unit is left.
    """
    blocks = mlp_blocks(model)
    if isinstance(reduction, GroupedReduction):
        share_mlps(blocks, resolve_groups(reduction, depth=len(blocks)), reduction.scale)
    elif isinstance(reduction, ShallowReduction):
        for block in blocks:
            narrow_mlp(block.mlp, reduction.keep, select_units=reduction.select_units)
    elif isinstance(reduction, ThinReduction):
        width = blocks[0].mlp.fc1.in_features
        if int(width * reduction.mlp_ratio) < 1:
            # timm would take the embedding width instead, in silence.
            raise UserError(
                f"config: reduction.mlp_ratio = {reduction.mlp_ratio} leaves no hidden units at width {width}"
            )
    return model


def mlp_blocks(model: nn.Module) -> list[Any]:
    """The transformer blocks of a timm VisionTransformer whose `mlp` is timm's `Mlp`.

    Raises:
        UserError: it is another kind of model, or its blocks carry another kind of MLP.
    """
    kind = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise UserError(f"model {kind} is no timm VisionTransformer, which scalevit reduces (ViT, DeiT, DINOv2)")
    blocks = list(model.blocks)
    if not blocks:
        raise UserError(f"model {kind} has no transformer blocks")
    for index, block in enumerate(blocks):
        mlp = getattr(block, "mlp", None)
        if not isinstance(mlp, Mlp) or not isinstance(mlp.fc1, nn.Linear):
            found = "no mlp" if mlp is None else f"a {type(mlp).__name__}"
            raise UserError(
                f"model {kind}: blocks.{index} has {found}, but scalevit reduces timm's Mlp (fc1, act, fc2)"
            )
    return blocks


def resolve_groups(reduction: GroupedReduction, depth: int) -> list[list[int]]:
    """Every block's group: lists of block indices that cover 0..depth-1, each in ascending order.

    Raises:
        UserError: the depth is no multiple of the group size, or explicit groups overlap or leave the model.
    """
    if reduction.groups is None:
        size = reduction.group_size or 2
        if depth % size:
            fitting = [divisor for divisor in range(2, depth + 1) if depth % divisor == 0]
            raise UserError(
                f"config: reduction.group_size = {size} does not divide the model's {depth} blocks; "
                f"allowed: {', '.join(map(str, fitting))}, or explicit reduction.groups"
            )
        return [list(range(first, first + size)) for first in range(0, depth, size)]

    named = [index for group in reduction.groups for index in group]
    for index in named:
        if index >= depth:
            raise UserError(f"config: reduction.groups names block {index}, but the model has blocks 0 to {depth - 1}")
        if named.count(index) > 1:
            raise UserError(f"config: reduction.groups names block {index} twice")
    alone = [[index] for index in range(depth) if index not in named]
    return sorted([sorted(group) for group in reduction.groups] + alone)


@torch.no_grad()
def share_mlps(blocks: Sequence[Any], groups: Sequence[Sequence[int]], scale: float) -> None:
    """Lets each group of two or more blocks use the MLP module of its first block.

    `fc1.weight`, `fc1.bias` and `fc2.weight` of that MLP are multiplied by `scale` once; `fc2.bias` is not.
    The other blocks' MLPs are dropped. The *module* is shared, never only its parameters: engines wrap modules.
    """
    for first, *others in groups:
        if not others:
            continue
        scale_mlp(blocks[first].mlp, scale)
        for other in others:
            blocks[other].mlp = blocks[first].mlp


@torch.no_grad()
def scale_mlp(mlp: Any, scale: float) -> None:
    """Multiplies `fc1.weight`, `fc1.bias` and `fc2.weight` by `scale`, in place; `fc2.bias` stays."""
    mlp.fc1.weight.mul_(scale)
    if mlp.fc1.bias is not None:
        mlp.fc1.bias.mul_(scale)
    mlp.fc2.weight.mul_(scale)


@torch.no_grad()
def narrow_mlp(mlp: Any, keep: float, select_units: str = "first") -> None:
    """Keeps `int(keep * hidden)` hidden units of an MLP, in place.

    Args:
        mlp: fc1 (hidden, D), fc2 (D_out, hidden).
        keep: share of the hidden units.
        select_units: "first" keeps the first units (the paper, for models trained from scratch); "importance" those
            with the largest |fc1 row| x |fc2 column|, in their old order (for pretrained weights).

    Raises:
        UserError: no unit is left, or a norm lies between the two layers.
    """
    hidden = mlp.fc1.out_features
    kept = int(keep * hidden)
    if kept < 1:
        raise UserError(f"config: reduction.keep = {keep} leaves none of the {hidden} hidden units")
    if not isinstance(mlp.norm, nn.Identity):
        raise UserError("model: an MLP with a norm between fc1 and fc2 cannot be narrowed")
    if select_units == "importance":
        importance = mlp.fc1.weight.norm(dim=1) * mlp.fc2.weight.norm(dim=0)
        units = importance.topk(kept).indices.sort().values
    else:
        units = torch.arange(kept, device=mlp.fc1.weight.device)
    mlp.fc1.weight = nn.Parameter(mlp.fc1.weight[units].clone())
    if mlp.fc1.bias is not None:
        mlp.fc1.bias = nn.Parameter(mlp.fc1.bias[units].clone())
    mlp.fc2.weight = nn.Parameter(mlp.fc2.weight[:, units].clone())
    mlp.fc1.out_features = mlp.fc2.in_features = kept
