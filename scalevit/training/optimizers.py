"""AdamW's parameter groups and the learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from scalevit.config.tree import OptimizerConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the unique parameters, in timm's two groups.

    Biases, norms and other vectors, and what the model's `no_weight_decay()` names (tokens, position embeddings), do
    not decay. Fused on a GPU.
    """
    named_exempt: Any = getattr(module, "no_weight_decay", set)
    groups = param_groups_weight_decay(module, config.weight_decay, no_weight_decay_list=named_exempt())
    on_gpu = next(module.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=on_gpu or None)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then half a cosine. Equal to timm's CosineLRScheduler, which moves once per epoch."""

    config: OptimizerConfig
    epochs: int

    def lr(self, epoch: float) -> float:
        """The learning rate after so many epochs (whole ones, where it moves once per epoch)."""
        config = self.config
        if epoch < config.warmup_epochs:
            return config.warmup_lr + epoch / config.warmup_epochs * (config.lr - config.warmup_lr)
        progress = min(epoch / self.epochs, 1.0)
        return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))
