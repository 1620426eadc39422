"""Watches the MLPs of a model at work: what each block's MLP is given, what its hidden units compute, what it returns.

Knows blocks and MLPs by `mlps`. Must not know what becomes of the numbers. Before fusing: kernels have no hidden units
that can be seen.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scalevit.models.mlps import mlp_views, transformer_blocks


@dataclass(frozen=True)
class MlpUse:
    """One MLP in one forward pass; blocks that share an MLP use it once each. Rows are the tokens of all images."""

    block: int
    index: int
    """Among the MLPs of the block, which has one in most models."""
    inputs: Tensor
    """(rows, width)."""
    hidden: Tensor
    """(rows, hidden): the input of the MLP's last layer."""
    output: Tensor
    """(rows, D)."""


class _LastBlock(Exception):
    """Ends a forward pass behind the last block that is watched."""


@torch.no_grad()
def watch_mlps(
    model: nn.Module, images: Tensor, receive: Callable[[MlpUse], None], *, last: int | None = None
) -> Tensor | None:
    """One forward pass.

    Args:
        model: in evaluation mode.
        images: (b, C, H, W), on the model's device.
        receive: called with each use of an MLP, in the order of the forward. It must not keep the tensors.
        last: block behind which the pass ends; None for the whole model.

    Returns:
        The model's output; None if the pass ended before.
    """
    block, inputs = -1, torch.empty(0)

    def enter_block(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal block
            block = number

        return hook

    def enter_mlp(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal inputs
        inputs = arguments[0]

    def leave_mlp(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            receive(MlpUse(block, number, *(tensor.flatten(0, -2) for tensor in (inputs, arguments[0], output))))

        return hook

    def stop(*_: Any) -> None:
        raise _LastBlock

    blocks = transformer_blocks(model)
    with ExitStack() as hooks:
        seen: set[nn.Module] = set()
        for number, (module, views) in enumerate(zip(blocks, mlp_views(model), strict=True)):
            hooks.callback(module.register_forward_pre_hook(enter_block(number)).remove)
            for index, view in enumerate(views):
                if view.module not in seen:  # one that blocks share has one set of hooks
                    seen.add(view.module)
                    hooks.callback(view.module.register_forward_pre_hook(enter_mlp).remove)
                    hooks.callback(view.output.register_forward_hook(leave_mlp(index)).remove)
        if last is not None:
            hooks.callback(blocks[last].register_forward_hook(stop).remove)
        try:
            return model(images)
        except _LastBlock:
            return None
