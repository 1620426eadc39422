"""The learning rate against timm's scheduler, and what is refused."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from scalevit.config.training import ScheduleConfig
from scalevit.errors import SettingError
from scalevit.training.schedules import _NAMES, Schedule


@pytest.mark.parametrize("update", ["epoch", "step"])
def test_the_cosine_is_timms(update: str) -> None:
    config = ScheduleConfig(warmup_epochs=5, warmup_lr=1e-5, min_lr=1e-6, update=update)
    epochs, steps = 30, 7
    unit = 1 if update == "epoch" else steps
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = CosineLRScheduler(
        optimizer, t_initial=epochs * unit, lr_min=config.min_lr, warmup_t=5 * unit, warmup_lr_init=config.warmup_lr
    )
    ours = Schedule(config, 1e-3, epochs)
    for step in range(epochs * steps):
        theirs.step(step // steps if update == "epoch" else step)
        epoch = step // steps if update == "epoch" else step / steps
        expected = optimizer.param_groups[0]["lr"]
        assert ours.lr(epoch) == (expected if update == "epoch" else pytest.approx(expected, rel=1e-12)), step


@pytest.mark.parametrize("name", _NAMES)
def test_every_schedule_is_a_function_of_the_epoch(name: str) -> None:
    """Asked in any order it gives the same, so that a resumed run needs no state."""
    schedule = Schedule(ScheduleConfig(name=name, warmup_epochs=0 if name == "none" else 2), 1e-3, 20)
    rates = [schedule.lr(epoch) for epoch in range(20)]
    again = Schedule(ScheduleConfig(name=name, warmup_epochs=0 if name == "none" else 2), 1e-3, 20)
    assert [again.lr(epoch) for epoch in reversed(range(20))] == rates[::-1]
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert (min(rates) < max(rates)) == (name != "none")


@pytest.mark.parametrize(
    ("args", "peak"), [({"cooldown_epochs": 4}, 3), ({"warmup_prefix": True}, 3), ({"cycle_limit": 2}, 3)]
)
def test_a_schedule_ends_with_the_run(args: dict[str, int], peak: int) -> None:
    schedule = Schedule(ScheduleConfig(warmup_epochs=3, min_lr=1e-6, args=args), 1e-3, 20)
    rates = [schedule.lr(epoch) for epoch in range(20)]
    assert schedule.lr(20) == pytest.approx(1e-6), "it ends where the run ends"
    assert rates[peak] == pytest.approx(1e-3, rel=0.3)
    if "cooldown_epochs" in args:
        assert rates[16:] == pytest.approx([1e-6] * 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosin"}, 'schedule = "cosin": is not a schedule of timm; nearest: cosine'),
        ({"name": "plateau"}, 'schedule = "plateau": needs a metric, which this version does not pass to schedules'),
        ({"name": "none"}, 'schedule = "none": has no warm-up: set schedule.name=constant'),
        ({"args": {"decay": 1}}, "schedule_args = .*unexpected keyword argument 'decay'"),
        ({"args": {"num_epochs": 9}}, "schedule_args = .*multiple values"),
        (
            {"args": {"step_on_epochs": False, "updates_per_epoch": 5}},
            "step_on_epochs is not used: set schedule.update",
        ),
        ({"args": {"updates_per_epoch": 5}}, "updates_per_epoch is not used: set schedule.update"),
        ({"update": "step", "args": {"noise": 0.4}}, "schedule_args = .*noise needs schedule.update=epoch"),
        ({"args": {"cycle_limit": 3}}, "schedule_args = .*cannot be fitted to 20"),
        ({"name": "wsd", "args": {"decay_epochs": 50}}, "schedule_args = .*decay_epochs"),
    ],
)
def test_refusals(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message) as refused:
        Schedule(ScheduleConfig(warmup_epochs=3, **settings), 1e-3, 20)
    assert "\n" not in str(refused.value)
