"""Converted commands against timm's own factories, called with the same arguments as its train.py calls them."""

from types import SimpleNamespace
from typing import Any

import pytest
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

from scalevit.cli.from_timm import TimmRegistries
from scalevit.config.from_timm.arguments import TimmArguments, read_arguments
from scalevit.config.from_timm.convert import convert
from scalevit.config.tree import Config
from scalevit.training.optimizers import build_optimizer
from scalevit.training.schedules import Schedule

UPDATES = 4  # per epoch


def converted(options: str) -> tuple[Config, TimmArguments]:
    arguments = read_arguments(f"python train.py --model vit_tiny_patch16_224 {options}")
    return convert(arguments, timm=_Unchecked()).config, arguments


class _Unchecked(TimmRegistries):
    """Builds no model for a check: the commands differ in what is trained with, not in what."""

    def check(self, config: Config, processes: int) -> None: ...


def timm_settings(arguments: TimmArguments, lr: float) -> Any:
    return SimpleNamespace(**{**arguments.values, "lr": lr})


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--epochs 20 --warmup-prefix --cooldown-epochs 4 --min-lr 1e-3 --warmup-lr 1e-2",
        "--epochs 12 --lr-cycle-limit 3 --cooldown-epochs 2",
        "--epochs 6 --warmup-epochs 2 --lr-cycle-limit 3 --lr-cycle-mul 2",
        "--sched tanh --epochs 20 --lr-noise 0.4 0.9 --seed 3 --lr-noise-std 0.5",
        "--sched poly --epochs 20 --lr-k-decay 2 --decay-rate 0.5",
        "--sched step --epochs 20 --decay-epochs 2.4 --decay-rate .97 --cooldown-epochs 3",
        "--sched step --epochs 20 --warmup-prefix",
        "--sched multistep --epochs 20 --decay-milestones 8 12",
        "--sched wsd --epochs 100",
        "--sched wsd --epochs 20 --decay-epochs 0.25 --cooldown-epochs 2",
        "--sched constant --epochs 12",
        "--sched none --epochs 12",
        "--epochs 12 --sched-on-updates --warmup-epochs 3 --cooldown-epochs 2",
        "--lr-base 0.2 --lr-base-size 64 --opt lamb --epochs 8 -b 32 --grad-accum-steps 3",
    ],
)
def test_the_schedule_is_that_of_timm_at_every_step(options: str) -> None:
    config, arguments = converted(options)
    base = arguments["batch_size"] * arguments["grad_accum_steps"] / arguments["lr_base_size"]
    lr = arguments["lr_base"] * (base**0.5 if arguments["opt"] == "lamb" else base)
    optimizer = create_optimizer_v2(nn.Linear(1, 1), **optimizer_kwargs(timm_settings(arguments, lr)))
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(timm_settings(arguments, lr)), updates_per_epoch=UPDATES
    )
    ours = Schedule.from_config(config, steps_per_epoch=UPDATES)
    assert config.train.epochs == epochs
    for update in range(epochs * UPDATES):
        epoch = update // UPDATES
        if scheduler is not None and update:
            # As the program does: after each update, and before each epoch but the first.
            scheduler.step_update(update)
            if update % UPDATES == 0:
                scheduler.step(epoch)
        expected = optimizer.param_groups[0]["lr"]
        assert ours.lr_of_step(epoch, update / UPDATES) == pytest.approx(expected, rel=1e-12), f"update {update}"


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--momentum 0.8 --opt-kwargs nesterov=False",
        "--opt adamw --opt-eps 1e-6 --opt-betas 0.9 0.95 --weight-decay 0.05 --lr 1e-3",
        "--opt lamb --opt-eps 1e-5",
        "--opt lion --opt-betas 0.9 0.99",
        "--opt nadamw --momentum 0.5",
        "--opt rmsproptf --opt-eps 1e-3 --opt-kwargs alpha=0.95",
    ],
)
def test_the_optimizer_has_the_settings_of_timm(options: str) -> None:
    config, arguments = converted(options)
    settings = timm_settings(arguments, config.optimizer.lr)
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    theirs = create_optimizer_v2(model, **optimizer_kwargs(settings), **arguments["opt_kwargs"])
    ours = build_optimizer(model, config.optimizer)
    assert type(ours) is type(theirs)
    groups = [
        [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for optimizer in (ours, theirs)
    ]
    assert groups[0] == groups[1]
