"""The schedule against timm's scheduler, and the parameter groups."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from scalevit.config.model import ModelConfig
from scalevit.config.training import OptimizerConfig, ScheduleConfig
from scalevit.models.build import build_model
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.training.optimizers import build_optimizer
from scalevit.training.schedules import Schedule


@pytest.mark.parametrize("update", ["epoch", "step"])
def test_the_schedule_is_timms(update: str) -> None:
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
        assert ours.lr(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step


def test_groups_hold_every_parameter_once_and_vectors_do_not_decay() -> None:
    config = ModelConfig(
        name="vit_tiny_patch16_224", image_size=32, kwargs={"embed_dim": 48, "depth": 4, "num_heads": 3}
    )
    model = build_model(config, GroupedReduction(), seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.05))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay) == len(names)
    assert decay["blocks.0.mlp.fc1.weight"] == decay["patch_embed.proj.weight"] == 0.05
    for exempt in ("blocks.0.mlp.fc1.bias", "norm.weight", "pos_embed", "cls_token"):
        assert decay[exempt] == 0.0
