"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass

from scalevit.config.training import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then half a cosine. Equal to timm's CosineLRScheduler, which moves once per epoch."""

    config: ScheduleConfig
    base_lr: float
    epochs: int

    def lr(self, epoch: float) -> float:
        """The learning rate after so many epochs (whole ones, where it moves once per epoch)."""
        config = self.config
        if epoch < config.warmup_epochs:
            return config.warmup_lr + epoch / config.warmup_epochs * (self.base_lr - config.warmup_lr)
        progress = min(epoch / self.epochs, 1.0)
        return config.min_lr + 0.5 * (self.base_lr - config.min_lr) * (1 + math.cos(math.pi * progress))
