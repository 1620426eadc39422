"""timm's optimizers: groups, what an update reads, what is kept, and what is refused in one line."""

from typing import Any

import pytest
import timm.optim
import torch
from torch import nn

from scalevit.config.model import ModelConfig
from scalevit.config.training import OptimizerConfig
from scalevit.distributed import World
from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.fsdp.settings import FsdpSettings
from scalevit.errors import SettingError
from scalevit.models.build import build_model
from scalevit.models.freezing import freeze
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.training.layer_decay import freeze_slow_layers
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
        (
            "adamw",
            {"layer_decay": 0.7},
            "optimizer_args = .*: layer_decay is no argument of the optimizer: see optimizer.",
        ),
    ],
)
def test_refusals(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message) as error:
        check_optimizer(OptimizerConfig(name=name, args=args), "matrices")
    assert "\n" not in str(error.value)


TINY = ModelConfig(name="vit_tiny_patch16_224", image_size=32, kwargs={"embed_dim": 48, "depth": 4, "num_heads": 3})
SHARED_MLP = "blocks.0.mlp.fc1.weight"


def scales(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Factor of the learning rate and weight decay of each parameter; each is in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len({name for name, _ in found})
    return {name: (group["lr_scale"], group["weight_decay"]) for name, group in found}


@pytest.mark.parametrize("reduction", [NoReduction(), GroupedReduction()], ids=lambda reduction: reduction.strategy)
@pytest.mark.parametrize("least", [0.0, 0.3])
def test_layer_decay_is_that_of_timm(reduction: Reduction, least: float) -> None:
    model = build_model(TINY, reduction, seed=0)
    config = OptimizerConfig(layer_decay=0.7, layer_decay_min_scale=least, weight_decay=0.05)
    ours = build_optimizer(model, config).param_groups
    expected = timm.optim.create_optimizer_v2(
        model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7, layer_decay_min_scale=least
    ).param_groups
    assert len(ours) == len(expected)
    for group, other in zip(ours, expected, strict=True):
        assert [id(p) for p in group.pop("params")] == [id(p) for p in other.pop("params")]
        assert group == other
    assert min(group["lr_scale"] for group in ours) == max(least, 0.7**5)


@pytest.mark.parametrize("reduction", [NoReduction(), GroupedReduction()], ids=lambda reduction: reduction.strategy)
def test_slow_layers_are_left_out_as_by_timm(reduction: Reduction) -> None:
    """The factors of the embedding, 0.7^5, and of the first block, 0.7^4, are below 0.3."""
    models = [build_model(TINY, reduction, seed=0) for _ in range(2)]
    config = OptimizerConfig(layer_decay=0.7, layer_decay_no_opt_scale=0.3, weight_decay=0.05)
    freeze_slow_layers(models[0], config)
    ours = build_optimizer(models[0], config)
    decay = {"layer_decay": 0.7, "layer_decay_no_opt_scale": 0.3}
    expected = timm.optim.create_optimizer_v2(models[1], "adamw", lr=1e-3, weight_decay=0.05, **decay)
    assert scales(ours, models[0]) == scales(expected, models[1])
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in models]
    assert trained[0] == trained[1]
    assert "blocks.1.norm1.weight" in trained[0]
    assert "blocks.0.norm1.weight" not in trained[0]


@pytest.mark.parametrize(("choice", "trained"), [("first", False), ("last", True)])
def test_a_shared_mlp_is_left_out_by_the_factor_that_it_gets(choice: Any, trained: bool) -> None:
    model = build_model(TINY, GroupedReduction(), seed=0)
    config = OptimizerConfig(layer_decay=0.7, layer_decay_no_opt_scale=0.3, layer_decay_shared=choice)
    freeze_slow_layers(model, config)
    assert (SHARED_MLP in scales(build_optimizer(model, config), model)) == trained


@pytest.mark.parametrize(("choice", "power"), [("first", (4,)), ("mean", (3, 4)), ("last", (3,))])
def test_a_shared_mlp_takes_the_learning_rate_of_the_block_that_is_named(choice: Any, power: tuple[int, ...]) -> None:
    model = build_model(TINY, GroupedReduction(), seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(layer_decay=0.7, layer_decay_shared=choice))
    found = scales(optimizer, model)
    wanted = sum(0.7**exponent for exponent in power) / len(power)
    assert found[SHARED_MLP] == (pytest.approx(wanted), 0.05)
    assert found[SHARED_MLP.replace("weight", "bias")] == (pytest.approx(wanted), 0.0)
    assert found["blocks.0.norm1.weight"] == (pytest.approx(0.7**4), 0.0)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(group["params"] for group in optimizer.param_groups)


def test_frozen_parameters_are_in_no_group() -> None:
    model = freeze(build_model(TINY, GroupedReduction(), seed=0), ["blocks.[0-1]", "patch_embed"])
    for config in (OptimizerConfig(), OptimizerConfig(layer_decay=0.7, layer_decay_shared="last")):
        held = {id(p) for group in build_optimizer(model, config).param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_rehearsal_of_an_optimizer_needs_no_layers_of_timm() -> None:
    """FSDP2 tries an optimizer that reads whole tensors on a plain layer, also with layer decay."""
    optimizer = build_optimizer(torch.nn.Linear(4, 5), OptimizerConfig(name="lamb", layer_decay=0.75))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
