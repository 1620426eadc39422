"""The learning rate against timm's scheduler, and what is refused."""

from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler, create_scheduler_v2
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


# Name, arguments, and the epochs that are timm's own where the arguments add some to 24.
SCHEDULES: list[tuple[str, dict[str, Any], int]] = [
    ("cosine", {"k_decay": 0.5}, 24),
    ("cosine", {"cooldown_epochs": 4}, 20),
    ("cosine", {"warmup_prefix": True}, 21),
    ("cosine", {"cycle_limit": 2, "cycle_decay": 0.5}, 12),
    ("cosine", {"cycle_limit": 2, "cycle_mul": 2.0}, 8),
    ("step", {"decay_epochs": 5, "decay_rate": 0.5}, 24),
    ("multistep", {"decay_milestones": [8, 16], "decay_rate": 0.3}, 24),
    ("poly", {"decay_rate": 2.0, "k_decay": 2.0}, 24),
    ("tanh", {}, 24),
    ("tanh", {"cooldown_epochs": 2, "cycle_limit": 2}, 11),
    ("wsd", {"decay_epochs": 5.5}, 24),
    ("rsqrt", {"decay_epochs": 4, "stable_timescale": 2}, 24),
    ("constant", {}, 24),
]
NOISE = {"noise": [0.4, 0.9], "noise_pct": 0.5, "noise_std": 0.2, "noise_seed": 7}


def timms(name: str, args: dict[str, Any], epochs: int, steps: int, **more: Any) -> tuple[Any, torch.optim.Optimizer]:
    """timm's schedule as its trainer builds it.

    Args:
        steps: in an epoch, if it changes at each of them; else 0.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    warmup = {"warmup_epochs": 3, "warmup_lr": 1e-5, "min_lr": 1e-6}
    scheduler, _ = create_scheduler_v2(
        optimizer, name, epochs, step_on_epochs=not steps, updates_per_epoch=steps, **warmup, **args, **more
    )
    return scheduler, optimizer


@pytest.mark.parametrize("update", ["epoch", "step"])
@pytest.mark.parametrize(("name", "args", "own"), SCHEDULES)
def test_every_schedule_is_timms_at_each_step(name: str, args: dict[str, Any], own: int, update: Any) -> None:
    steps = 4
    config = ScheduleConfig(name=name, warmup_epochs=3, warmup_lr=1e-5, min_lr=1e-6, update=update, args=args)
    ours = Schedule(config, 1e-3, 24, steps_per_epoch=steps)
    theirs, optimizer = timms(name, args, own, steps if update == "step" else 0)
    rates = set()
    for step in range(24 * steps):
        if update == "step":
            theirs.step_update(step)
        else:
            theirs.step(step // steps)
        expected = optimizer.param_groups[0]["lr"]
        assert ours.lr_of_step(step // steps, step / steps) == pytest.approx(expected, rel=1e-9), step
        rates.add(expected)
    assert len(rates) > 3


def test_noise_is_timms() -> None:
    ours = Schedule(ScheduleConfig(warmup_epochs=3, min_lr=1e-6, args=NOISE), 1e-3, 24)
    plain = Schedule(ScheduleConfig(warmup_epochs=3, min_lr=1e-6), 1e-3, 24)
    theirs, optimizer = timms("cosine", NOISE, 24, 0)
    differing = 0
    for epoch in range(24):
        theirs.step(epoch)
        assert ours.lr(epoch) == optimizer.param_groups[0]["lr"]
        differing += ours.lr(epoch) != plain.lr(epoch)
    assert differing == 12, "from 0.4 to 0.9 of the epochs"


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("metric", ["top1", "loss"])
@pytest.mark.parametrize("noise", [{}, NOISE], ids=["plain", "noise"])
def test_a_plateau_is_timms_and_follows_from_the_metrics(metric: Any, noise: dict[str, Any]) -> None:
    """Every second epoch is evaluated; a resumed run, which has the metrics only, has the same rates."""
    args = {"patience_epochs": 1, "decay_rate": 0.5, **noise}
    config = ScheduleConfig(name="plateau", warmup_epochs=3, warmup_lr=1e-5, min_lr=1e-6, args=args)
    theirs, optimizer = timms("plateau", args, 24, 0, plateau_mode="min" if metric == "loss" else "max")
    values = [10, 20, 30, 30, 29, 30, 31, 31, 31, 31, 31, 40]
    metrics = {2 * place + 2: float(value) for place, value in enumerate(values)}
    ours = Schedule(config, 1e-3, 24, metric=metric)
    rates = []
    for epoch in range(24):
        if epoch:
            theirs.step(epoch, metrics.get(epoch))
        so_far = {done: value for done, value in metrics.items() if done <= epoch}
        rates.append(ours.lr_of_step(epoch, epoch, so_far))
        assert rates[-1] == optimizer.param_groups[0]["lr"], epoch
        assert Schedule(config, 1e-3, 24, metric=metric).lr_of_step(epoch, epoch, so_far) == rates[-1]
    assert len(set(rates)) > 5
    assert rates[-1] < 0.6e-3


@pytest.mark.parametrize("name", _NAMES)
def test_every_schedule_is_a_function_of_the_epoch(name: str) -> None:
    """Asked in any order it gives the same, so that a resumed run needs no state."""
    schedule = Schedule(ScheduleConfig(name=name, warmup_epochs=0 if name == "none" else 2), 1e-3, 20)
    rates = [schedule.lr_of_step(epoch, epoch) for epoch in range(20)]
    again = Schedule(ScheduleConfig(name=name, warmup_epochs=0 if name == "none" else 2), 1e-3, 20)
    assert [again.lr_of_step(epoch, epoch) for epoch in reversed(range(20))] == rates[::-1]
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
        ({"name": "plateau", "update": "step"}, 'schedule = "plateau": needs schedule.update=epoch'),
        ({"name": "plateau", "args": {"decay_rate": 2.0}}, r"schedule_args = .*Factor should be < 1.0"),
        ({"name": "none"}, 'schedule = "none": has no warm-up: set schedule.name=constant'),
        ({"args": {"decay": 1}}, "schedule_args = .*unexpected keyword argument 'decay'"),
        ({"args": {"num_epochs": 9}}, "num_epochs is not used: set train.epochs instead"),
        ({"args": {"warmup_lr": 9}}, "warmup_lr is not used: set schedule.warmup_lr instead"),
        ({"name": "plateau", "args": {"plateau_mode": "min"}}, "plateau_mode is not used: set evaluation.metric"),
        ({"name": "plateau", "args": {"patience_epochs": "abc"}}, "schedule_args = .*plateau refuses them"),
        ({"name": "plateau", "args": {"patience_epochs": -1}}, "patience_epochs must not be negative"),
        ({"name": "multistep", "args": {"decay_milestones": [3, -1]}}, "decay_milestones must not be negative"),
        ({"args": {"noise": [0.5, 0.6], "noise_pct": "abc"}}, "schedule_args = .*cosine refuses them"),
        ({"args": {"noise": 0.5, "noise_pct": 0}}, "noise_pct must be above 0"),
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
