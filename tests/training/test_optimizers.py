"""timm's optimizers: groups, what an update reads, what is kept, and what is refused in one line."""

from typing import Any

import pytest
import torch
from torch import nn

from scalevit.config.model import ModelConfig
from scalevit.config.training import OptimizerConfig
from scalevit.distributed import World
from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.fsdp.settings import FsdpSettings
from scalevit.errors import SettingError
from scalevit.models.build import build_model
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.training.optimizers import (
    build_optimizer,
    check_optimizer,
    state_tensors,
    update_scope,
)


def test_groups_hold_every_parameter_once_and_vectors_do_not_decay() -> None:
    config = ModelConfig(
        name="vit_tiny_patch16_224", image_size=32, kwargs={"embed_dim": 48, "depth": 4, "num_heads": 3}
    )
    model = build_model(config, GroupedReduction(), seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.05))
    assert type(optimizer) is torch.optim.AdamW
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay) == len(names)
    assert decay["blocks.0.mlp.fc1.weight"] == decay["patch_embed.proj.weight"] == 0.05
    for exempt in ("blocks.0.mlp.fc1.bias", "norm.weight", "pos_embed", "cls_token"):
        assert decay[exempt] == 0.0


@pytest.mark.parametrize(
    ("name", "args", "scope"),
    [
        ("adamw", {}, "elements"),
        ("adamw", {"amsgrad": True}, "elements"),
        ("sgd", {}, "elements"),
        ("momentum", {"momentum": 0.8}, "elements"),
        ("lion", {}, "elements"),
        ("nadamw", {}, "elements"),
        ("adan", {}, "elements"),
        ("rmsprop", {}, "elements"),
        ("lamb", {}, "tensors"),
        ("lamb", {"trust_clip": True, "max_grad_norm": 0.1}, "tensors"),  # also a norm over all parameters
        ("lars", {}, "tensors"),
        ("cadamw", {}, "tensors"),  # a mean over each tensor
        ("adamp", {}, "matrices"),  # rows, but only where the gradient is orthogonal to them
        ("muon", {}, "matrices"),
        ("adafactor", {}, "matrices"),
    ],
)
def test_what_an_update_reads(name: str, args: dict[str, Any], scope: str) -> None:
    assert update_scope(name, args) == scope


@pytest.mark.parametrize(
    ("name", "args", "kept"),
    [
        ("adamw", {}, ["exp_avg", "exp_avg_sq"]),
        ("adamw", {"amsgrad": True}, ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        ("lion", {}, ["exp_avg"]),
        ("momentum", {"momentum": 0.0}, []),
        ("adan", {}, ["exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"]),
    ],
)
def test_what_is_kept(name: str, args: dict[str, Any], kept: list[str]) -> None:
    assert state_tensors(name, args) == kept


def world(size: int) -> World:
    return World(rank=0, size=size, local_rank=0, ranks_per_node=size, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "works", "refused", "where"),
    [
        ("lion", [(DeepSpeedSettings(stage=3), 2), (FsdpSettings(), 8)], [], ""),
        (
            "lamb",
            [(DeepSpeedSettings(stage=0), 2), (FsdpSettings(), 8)],
            [(DeepSpeedSettings(stage=1), 1), (DeepSpeedSettings(stage=3), 2)],
            "ZeRO stage 0 or FSDP2$",
        ),
        (
            "muon",
            [(DeepSpeedSettings(stage=0), 2), (FsdpSettings(), 1), (FsdpSettings(shard_size=1), 4)],
            [(DeepSpeedSettings(stage=2), 1), (FsdpSettings(), 2), (FsdpSettings(shard_size=2), 4)],
            "ZeRO stage 0 or FSDP2 with one shard$",
        ),
        ("adagrad", [(FsdpSettings(), 2)], [(DeepSpeedSettings(stage=1), 1)], "ZeRO stage 0 or FSDP2$"),
    ],
)
def test_where_an_optimizer_may_run(name: str, works: list[Any], refused: list[Any], where: str) -> None:
    for settings, ranks in works:
        check_optimizer(OptimizerConfig(name=name), settings.update_scope(world(ranks)))
    for settings, ranks in refused:
        with pytest.raises(SettingError, match=f'^optimizer = "{name}": .*works with {where}') as error:
            check_optimizer(OptimizerConfig(name=name), settings.update_scope(world(ranks)))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("adamv", {}, 'optimizer = "adamv": is not an optimizer of timm; nearest: adam'),
        ("adahessian", {}, 'optimizer = "adahessian": it cannot be run with gradients only'),
        ("kron", {}, r'optimizer = "kron": its state cannot be saved \(Q is a list\)'),
        ("fusedadam", {}, 'optimizer = "fusedadam": it cannot be built here'),
        ("bnbadamw8bit", {}, 'optimizer = "bnbadamw8bit": it cannot be built here'),
        ("adamw", {"betta": 1}, "optimizer_args = .*unexpected keyword argument 'betta'"),
        ("adamw", {"betas": [2, 3]}, "optimizer_args = .*Invalid beta parameter"),
        ("adamw", {"betas": [0.9]}, "optimizer_args = .*refuses them"),
        ("adamw", {"lr": 1}, "optimizer_args = .*multiple values for keyword argument 'lr'"),
        ("lion", {"eps": 1e-8}, "optimizer_args = .*lion has no eps"),
    ],
)
def test_refusals(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message) as error:
        check_optimizer(OptimizerConfig(name=name, args=args), "matrices")
    assert "\n" not in str(error.value)


def test_layer_decay_scales_the_learning_rate() -> None:
    """timm's groups with an `lr_scale`; engines multiply it in."""
    config = ModelConfig(
        name="vit_tiny_patch16_224", image_size=32, kwargs={"embed_dim": 48, "depth": 4, "num_heads": 3}
    )
    model: nn.Module = build_model(config, GroupedReduction(), seed=0)
    groups = build_optimizer(model, OptimizerConfig(args={"layer_decay": 0.5})).param_groups
    assert min(group["lr_scale"] for group in groups) < 0.1
    assert max(group["lr_scale"] for group in groups) == 1.0
