"""The optimizer and its parameter groups."""

from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from scalevit.config.training import OptimizerConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the unique parameters, in timm's two groups.

    Biases, norms and other vectors, and what the model's `no_weight_decay()` names (tokens, position embeddings), do
    not decay. Fused on a GPU.
    """
    named_exempt: Any = getattr(module, "no_weight_decay", set)
    groups = param_groups_weight_decay(module, config.weight_decay, no_weight_decay_list=named_exempt())
    on_gpu = next(module.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.lr, fused=on_gpu or None, **config.args)
