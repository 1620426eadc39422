"""The learning rate as a pure function of the epoch, from timm's schedules. Must not know the run's optimizer."""

from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from torch import nn

from scalevit.config.training import ScheduleConfig
from scalevit.errors import SettingError, nearest

# For the nearest name in an error only: timm has no list of them.
_NAMES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")


class Schedule:
    """A schedule of `timm.scheduler.create_scheduler_v2` that ends with the run; warm-up is part of its epochs."""

    def __init__(self, config: ScheduleConfig, base_lr: float, epochs: int):
        """
        Args:
            base_lr: peak learning rate.
            epochs: of the run, with warm-up and cool-down.

        Raises:
            SettingError: "schedule" is no name that timm knows, or "schedule_args" do not fit it or the run.
        """
        if config.name == "plateau":
            raise SettingError("schedule", config.name, "needs a metric, which this version does not pass to schedules")
        if config.name == "none" and config.warmup_epochs > 0:
            reason = "has no warm-up: set schedule.name=constant, which has one, or schedule.warmup_epochs=0"
            raise SettingError("schedule", config.name, reason)
        _check_updates(config)
        self._by_step = config.update == "step"
        self._optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base_lr)
        self._scheduler = _fit(self._optimizer, config, epochs)
        try:
            for epoch in (0, epochs - 0.5 if self._by_step else epochs - 1):
                self.lr(epoch)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise SettingError("schedule_args", config.args, f"{config.name} refuses them ({error})") from error

    def lr(self, epoch: float) -> float:
        """The learning rate at a point of the run, in epochs; whole ones where it changes once per epoch."""
        if self._scheduler is not None:
            self._scheduler.step(int(epoch) if epoch == int(epoch) else epoch)
        return self._optimizer.param_groups[0]["lr"]

    def lr_of_step(self, epoch: int, progress: float) -> float:
        """The learning rate of an optimizer step.

        Args:
            epoch: in which the step begins, from 0.
            progress: the steps before it as a fraction of the run's, times the epochs.
        """
        return self.lr(progress if self._by_step else epoch)


def _check_updates(config: ScheduleConfig) -> None:
    """Refuses arguments that count updates of their own, or that need others than the config's."""
    for key in ("step_on_epochs", "updates_per_epoch"):
        if key in config.args:
            raise SettingError("schedule_args", config.args, f"{key} is not used: set schedule.update instead")
    noise = [key for key in config.args if key.startswith("noise")]
    if noise and config.update == "step":
        raise SettingError("schedule_args", config.args, f"{noise[0]} needs schedule.update=epoch")


def _fit(optimizer: torch.optim.Optimizer, config: ScheduleConfig, epochs: int) -> Any:
    """timm's scheduler; where its arguments add epochs (cool-down, warm-up prefix, cycles), fewer are its own."""
    scheduler, total = _create(optimizer, config, epochs)
    for own in (2 * epochs - int(total), epochs * epochs // int(total)):
        if total != epochs and own > 0:
            scheduler, total = _create(optimizer, config, own)
    if total != epochs:
        raise SettingError(
            "schedule_args", config.args, f"give a schedule of {total:g} epochs, which cannot be fitted to {epochs}"
        )
    return scheduler


def _create(optimizer: torch.optim.Optimizer, config: ScheduleConfig, epochs: int) -> tuple[Any, float]:
    """The scheduler, None where the rate is constant, and the epochs that it lasts."""
    try:
        return create_scheduler_v2(
            optimizer,
            sched=config.name,
            num_epochs=epochs,
            warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            **config.args,
        )
    except (TypeError, ValueError, AssertionError) as error:
        if "Unknown scheduler" in str(error):
            near = nearest(config.name, _NAMES)
            hint = f"; nearest: {near}" if near else ""
            raise SettingError("schedule", config.name, "is not a schedule of timm" + hint) from error
        reason = " ".join(str(error).split())[:200]
        raise SettingError("schedule_args", config.args, f"{config.name} refuses them ({reason})") from error
