"""The learning rate from timm's schedules, as a function of the epoch, and for a plateau of the metrics so far.

Must not know the run's optimizer.
"""

import warnings
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from torch import nn

from scalevit.config.base import SelectionMetric
from scalevit.config.training import ScheduleConfig
from scalevit.config.tree import Config
from scalevit.errors import SettingError, nearest_hint

# For the nearest name in an error only: timm has no list of them.
_NAMES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none", "plateau")

# Arguments of timm's factory, and the settings that give them.
_SET_ELSEWHERE = {
    "optimizer": "optimizer.name",
    "sched": "schedule.name",
    "num_epochs": "train.epochs",
    "warmup_epochs": "schedule.warmup_epochs",
    "warmup_lr": "schedule.warmup_lr",
    "min_lr": "schedule.min_lr",
    "plateau_mode": "evaluation.metric",
    "step_on_epochs": "schedule.update",
    "updates_per_epoch": "schedule.update",
}


class Schedule:
    """A schedule of `timm.scheduler.create_scheduler_v2` that ends with the run; warm-up is part of its epochs."""

    def __init__(
        self,
        config: ScheduleConfig,
        base_lr: float,
        epochs: int,
        *,
        steps_per_epoch: float = 1.0,
        metric: SelectionMetric = "top1",
    ):
        """
        Args:
            base_lr: peak learning rate.
            epochs: of the run, with warm-up and cool-down.
            steps_per_epoch: on average; timm counts whole ones, where the rate changes at every step.
            metric: that a plateau is one of.

        Raises:
            SettingError: "schedule" is no name that timm knows, or "schedule_args" do not fit it or the run.
        """
        if config.name == "plateau" and config.update == "step":
            raise SettingError("schedule", config.name, "needs schedule.update=epoch")
        if config.name == "none" and config.warmup_epochs > 0:
            reason = "has no warm-up: set schedule.name=constant, which has one, or schedule.warmup_epochs=0"
            raise SettingError("schedule", config.name, reason)
        _check_arguments(config)
        self._by_step = config.update == "step"
        self._unit = max(1, round(steps_per_epoch)) if self._by_step else 1  # of timm's time, per epoch
        updates = self._unit if self._by_step else 0
        mode = "min" if metric == "loss" else "max"
        options = {"step_on_epochs": not updates, "updates_per_epoch": updates, "plateau_mode": mode}
        self._build = partial(_fit, config, base_lr, epochs, options)
        self._optimizer, self._scheduler = self._build()
        self._has_plateau = config.name == "plateau"
        self._latest = (-1, base_lr)  # a plateau's epoch and its learning rate
        try:
            self._try(epochs)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise SettingError("schedule_args", config.args, f"{config.name} refuses them ({error})") from error
        self._latest = (-1, base_lr)

    def _try(self, epochs: int) -> None:
        """Takes every epoch's rate: timm uses some arguments late, those of a plateau once metrics stay the same."""
        if self._has_plateau:
            self._lr_of_plateau(epochs, dict.fromkeys(range(1, epochs + 1), 0.0))
            return
        for epoch in range(epochs):
            self.lr_of_step(epoch, epoch + 0.5)

    @classmethod
    def from_config(cls, config: Config, steps_per_epoch: float = 1.0) -> "Schedule":
        """The schedule of a run; without its steps, for a check of the settings."""
        lr, epochs, metric = config.peak_lr, config.train.epochs, config.evaluation.metric
        return cls(config.schedule, lr, epochs, steps_per_epoch=steps_per_epoch, metric=metric)

    def lr(self, epoch: float) -> float:
        """The learning rate at a point of the run, in epochs; whole ones where it changes once per epoch."""
        if self._scheduler is not None:
            time = epoch * self._unit
            step = self._scheduler.step_update if self._by_step else self._scheduler.step
            step(int(time) if time == int(time) else time)
        return self._optimizer.param_groups[0]["lr"]

    def lr_of_step(self, epoch: int, progress: float, metrics: Mapping[int, float] = MappingProxyType({})) -> float:
        """The learning rate of an optimizer step.

        Args:
            epoch: in which the step begins, from 0.
            progress: the steps before it as a fraction of the run's, times the epochs.
            metrics: what the evaluated epochs before it gave, by their number from 1.
        """
        if self._has_plateau:
            return self._lr_of_plateau(epoch, metrics)
        return self.lr(progress if self._by_step else epoch)

    def _lr_of_plateau(self, epoch: int, metrics: Mapping[int, float]) -> float:
        """timm's schedule has a state; here it follows from all metrics so far, so that a resumed run needs none."""
        if self._latest[0] != epoch:
            optimizer, scheduler = self._build()
            for done in range(1, epoch + 1):
                scheduler.step(done, metrics.get(done))
            self._latest = (epoch, optimizer.param_groups[0]["lr"])
        return self._latest[1]


def _check_arguments(config: ScheduleConfig) -> None:
    """Refuses arguments that other settings give, numbers that no schedule can use, and noise at every step."""
    for key, value in config.args.items():
        if key in _SET_ELSEWHERE:
            reason = f"{key} is not used: set {_SET_ELSEWHERE[key]} instead"
            raise SettingError("schedule_args", config.args, reason)
        numbers = value if isinstance(value, list) else [value]
        if key != "noise_seed" and any(isinstance(number, int | float) and number < 0 for number in numbers):
            raise SettingError("schedule_args", config.args, f"{key} must not be negative")
    if config.args.get("noise_pct") == 0:  # timm draws until a number is below it
        raise SettingError("schedule_args", config.args, "noise_pct must be above 0")
    noise = [key for key in config.args if key.startswith("noise")]
    if noise and config.update == "step":
        raise SettingError("schedule_args", config.args, f"{noise[0]} needs schedule.update=epoch")


def _fit(
    config: ScheduleConfig, base_lr: float, epochs: int, options: Mapping[str, Any]
) -> tuple[torch.optim.Optimizer, Any]:
    """timm's scheduler, of an optimizer that has only its rate; None where the rate is constant.

    Where its arguments add epochs (cool-down, warm-up prefix, cycles), fewer are its own.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base_lr)
    scheduler, total = _create(optimizer, config, epochs, options)
    for own in (2 * epochs - int(total), epochs * epochs // int(total)):
        if total != epochs and own > 0:
            scheduler, total = _create(optimizer, config, own, options)
    if total != epochs:
        raise SettingError(
            "schedule_args", config.args, f"give a schedule of {total:g} epochs, which cannot be fitted to {epochs}"
        )
    return optimizer, scheduler


def _create(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, epochs: int, options: Mapping[str, Any]
) -> tuple[Any, float]:
    """The scheduler, None where the rate is constant, and the epochs that it lasts.

    Args:
        options: of timm's factory, that follow from other settings.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # timm warns that it does not save a plateau's state
            return create_scheduler_v2(
                optimizer,
                sched=config.name,
                num_epochs=epochs,
                warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
                warmup_lr=config.warmup_lr,
                min_lr=config.min_lr,
                **options,
                **config.args,
            )
    except (TypeError, ValueError, AssertionError) as error:
        if "Unknown scheduler" in str(error):
            hint = nearest_hint(config.name, _NAMES)
            raise SettingError("schedule", config.name, f"is not a schedule of timm{hint}") from error
        reason = " ".join(str(error).split())[:200]
        raise SettingError("schedule_args", config.args, f"{config.name} refuses them ({reason})") from error
