"""Reduced models against the semantics written down in the paper and its code, computed here from timm alone."""

import math

import pytest
import timm
import torch
from torch import nn

from scalevit.config.model import KernelsConfig, ModelConfig
from scalevit.errors import SettingError, UserError
from scalevit.models.build import build_model
from scalevit.models.fused_mlp import FusedMlp
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions.apply import parse_reduction, reduce_model
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.models.reductions.thin import ThinReduction
from scalevit.tying import group_by_shared_parameters, tied_names, uses_per_parameter

TINY = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=32,
    num_classes=7,
    kwargs={"embed_dim": 48, "depth": 6, "num_heads": 3},
)
SEED = 42


def from_timm(**arguments: object) -> nn.Module:
    torch.manual_seed(SEED)
    return timm.create_model(
        TINY.name,
        num_classes=TINY.num_classes,
        img_size=TINY.image_size,
        drop_path_rate=TINY.drop_path,
        **TINY.kwargs,
        **arguments,
    )


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def test_none_is_timm() -> None:
    assert_equal(build_model(TINY, NoReduction(), seed=SEED).state_dict(), from_timm().state_dict())


def test_grouped_shares_the_scaled_mlp_of_each_pairs_first_block() -> None:
    expected = from_timm().state_dict()
    for even in range(0, 6, 2):
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            value = expected[f"blocks.{even}.mlp.{name}"].clone()
            if name != "fc2.bias":
                value *= 1 / math.sqrt(2)
            expected[f"blocks.{even}.mlp.{name}"] = value
            expected[f"blocks.{even + 1}.mlp.{name}"] = value
    model = build_model(TINY, GroupedReduction(), seed=SEED)
    assert_equal(model.state_dict(), expected)
    for even in range(0, 6, 2):
        assert model.blocks[even].mlp is model.blocks[even + 1].mlp


def test_shallow_keeps_the_first_units_and_everything_else_of_the_baseline() -> None:
    expected = from_timm().state_dict()
    for block in range(6):
        prefix = f"blocks.{block}.mlp."
        expected[prefix + "fc1.weight"] = expected[prefix + "fc1.weight"][:96]
        expected[prefix + "fc1.bias"] = expected[prefix + "fc1.bias"][:96]
        expected[prefix + "fc2.weight"] = expected[prefix + "fc2.weight"][:, :96]
    model = build_model(TINY, ShallowReduction(), seed=SEED)
    assert_equal(model.state_dict(), expected)
    assert (model.blocks[0].mlp.fc1.out_features, model.blocks[0].mlp.fc2.in_features) == (96, 96)


def test_thin_is_timm_with_a_narrower_ratio() -> None:
    assert_equal(build_model(TINY, ThinReduction(), seed=SEED).state_dict(), from_timm(mlp_ratio=2.0).state_dict())


def test_any_group_size_and_explicit_groups() -> None:
    threes = build_model(TINY, GroupedReduction(group_size=3, scale=1.0), seed=SEED)
    assert len({id(block.mlp) for block in threes.blocks}) == 2
    explicit = build_model(TINY, GroupedReduction(groups=[[5, 0], [2, 3, 4]], scale=0.5), seed=SEED)
    mlps = [block.mlp for block in explicit.blocks]
    assert mlps[0] is mlps[5]
    assert mlps[2] is mlps[3] is mlps[4]
    assert len({id(mlp) for mlp in mlps}) == 3
    baseline = from_timm().state_dict()
    # The group's first block gives the MLP; a block in no group keeps its own, unscaled.
    assert torch.equal(mlps[0].fc1.weight, baseline["blocks.0.mlp.fc1.weight"] * 0.5)
    assert torch.equal(mlps[1].fc1.weight, baseline["blocks.1.mlp.fc1.weight"])


def test_importance_keeps_the_strongest_units() -> None:
    baseline = from_timm()
    mlp = baseline.blocks[0].mlp
    strength = mlp.fc1.weight.norm(dim=1) * mlp.fc2.weight.norm(dim=0)
    units = strength.argsort(descending=True)[:96].sort().values
    model = build_model(TINY, ShallowReduction(select_units="importance"), seed=SEED)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, mlp.fc1.weight[units])
    assert torch.equal(model.blocks[0].mlp.fc2.weight, mlp.fc2.weight[:, units])


def test_tied_names_and_uses() -> None:
    model = build_model(TINY, GroupedReduction(), seed=SEED)
    tied = tied_names(model)
    assert tied["blocks.1.mlp.fc1.weight"] == "blocks.0.mlp.fc1.weight"
    assert len(tied) == 3 * 4
    uses = uses_per_parameter(model)
    assert uses["blocks.0.mlp.fc1.weight"] == 2
    assert uses["blocks.0.norm1.weight"] == 1
    assert "blocks.1.mlp.fc1.weight" not in uses
    b = model.blocks
    assert group_by_shared_parameters(list(b)) == [[b[0], b[1]], [b[2], b[3]], [b[4], b[5]]]


def test_blocks_that_share_are_one_unit_wherever_they_stand() -> None:
    model = build_model(TINY, GroupedReduction(groups=[[0, 3], [1, 5]]), seed=SEED)
    b = model.blocks
    assert group_by_shared_parameters(list(b)) == [[b[0], b[3]], [b[1], b[5]], [b[2]], [b[4]]]
    b[2].mlp = b[0].mlp
    b[2].attn = b[5].attn  # joins the first two
    assert group_by_shared_parameters(list(b)) == [[b[0], b[1], b[2], b[3], b[5]], [b[4]]]


def test_building_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    build_model(TINY, GroupedReduction(), seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model", "reduction", "parts"),
    [
        (
            ModelConfig(name="vit_base_patch16_225"),
            NoReduction(),
            ["model.name", "not a timm model", "nearest: vit_base_patch16_224"],
        ),
        (ModelConfig(name="resnet18", drop_path=0.0), NoReduction(), ["resnet18", "batch norms"]),
        (ModelConfig(name="vgg11", drop_path=0.1), NoReduction(), ["model.drop_path = 0.1", "no stochastic depth"]),
        (ModelConfig(name="deepseek_vit_412m_enc"), NoReduction(), ["has no classifier"]),
        (ModelConfig(name="vgg11", drop_path=0.0), GroupedReduction(), ["VGG", "no transformer blocks"]),
        (
            ModelConfig(name="vit_base_patch16_xp_224"),
            GroupedReduction(),
            ["block 0 (ParallelScalingBlock) has no MLP of its own", "needs timm's Mlp, GluMlp or SwiGLU"],
        ),
        (
            ModelConfig(name="swin_tiny_patch4_window7_224"),
            GroupedReduction(group_size=4),
            [
                "blocks 0 and 2 cannot share their MLPs, whose shapes are 96 x 384 and 192 x 768",
                "name groups of equal blocks",
            ],
        ),
        (TINY, ThinReduction(mlp_ratio=0.001), ["mlp_ratio = 0.001", "no hidden units"]),
        (TINY.model_copy(update={"kwargs": {"num_heads": 0}}), NoReduction(), ["cannot be built", "ZeroDivision"]),
        (TINY.model_copy(update={"kwargs": {"in_chans": 1}}), NoReduction(), ["in_chans", "model.in_chans"]),
        (TINY.model_copy(update={"kwargs": {"pretrained": True}}), NoReduction(), ["model.pretrained"]),
        (TINY, GroupedReduction(group_size=4), ["reduction.group_size = 4", "2, 3, 6"]),
        (TINY, GroupedReduction(groups=[[0, 6]]), ["block 6", "0 to 5"]),
        (TINY, GroupedReduction(groups=[[0, 1], [1, 2]]), ["block 1 twice"]),
        (TINY, ShallowReduction(keep=0.001), ["keep = 0.001", "192"]),
        (TINY, GroupedReduction(keep=0.001), ["reduction.keep = 0.001", "192"]),
        (TINY, ShallowReduction(blocks=[6]), ["reduction.blocks = [6]", "block 6", "0 to 5"]),
        (
            TINY.model_copy(update={"kwargs": {"mlp_ratio": 3.0}}),
            ThinReduction(),
            ["model.kwargs.mlp_ratio = 3.0", "the same argument"],
        ),
        (TINY.model_copy(update={"kwargs": {"num_classes": 3}}), NoReduction(), ["num_classes"]),
        (TINY.model_copy(update={"kwargs": {"colour": 3}}), NoReduction(), ["colour"]),
        (
            ModelConfig(name="vit_base_patch16_224_grouped"),
            GroupedReduction(),
            ["model.name", "is reduced already", "vit_base_patch16_224 and"],
        ),
    ],
)
def test_mistakes_are_one_line(model: ModelConfig, reduction, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build_model(model, reduction, seed=0, device="meta")
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize("reduction", [GroupedReduction(), ShallowReduction()], ids=lambda r: r.strategy)
def test_a_frozen_mlp_stays_frozen(reduction: Reduction) -> None:
    model = from_timm()
    model.blocks[0].mlp.requires_grad_(False)
    reduce_model(model, reduction)
    assert not any(p.requires_grad for p in model.blocks[0].mlp.parameters())
    assert all(p.requires_grad for p in model.blocks[2].mlp.parameters())


def test_structure_is_what_weights_must_share() -> None:
    by_default = GroupedReduction().structure(6)
    assert GroupedReduction(group_size=2, scale=0.5).structure(6) == by_default
    assert GroupedReduction(groups=[[1, 0], [2, 3], [4, 5]]).structure(6) == by_default
    assert GroupedReduction(groups=[[0, 1]]).structure(6) == GroupedReduction(groups=[[1, 0], [3]]).structure(6)
    assert GroupedReduction(group_size=3).structure(6) != by_default
    assert ShallowReduction(select_units="importance").structure(6) == ShallowReduction().structure(6)
    assert ShallowReduction(keep=0.25).structure(6) != ShallowReduction().structure(6)
    assert ShallowReduction(blocks=[3, 1, 1]).structure(6) == ShallowReduction(blocks=[1, 3]).structure(6)
    assert ShallowReduction(blocks=[1, 3]).structure(6) != ShallowReduction().structure(6)
    assert GroupedReduction(keep=0.5).structure(6) != by_default
    assert ThinReduction().structure(6) != NoReduction().structure(6)


def test_grouped_and_shallow_combined() -> None:
    model = build_model(TINY, GroupedReduction(keep=0.5, groups=[[0, 1]]), seed=SEED)
    whole = build_model(TINY, GroupedReduction(groups=[[0, 1]]), seed=SEED)
    assert [block.mlp.fc1.out_features for block in model.blocks] == [96] * 6
    assert model.blocks[0].mlp is model.blocks[1].mlp
    for block, other in zip(model.blocks, whole.blocks, strict=True):
        assert torch.equal(block.mlp.fc1.weight, other.mlp.fc1.weight[:96])
        assert torch.equal(block.mlp.fc2.weight, other.mlp.fc2.weight[:, :96])


def test_some_blocks_are_narrowed() -> None:
    model = build_model(TINY, ShallowReduction(blocks=[1, 4], keep=0.25), seed=SEED)
    assert [block.mlp.fc1.out_features for block in model.blocks] == [192, 48, 192, 192, 48, 192]


def test_blocks_are_found_after_mlps_are_fused() -> None:
    model = build_model(TINY, GroupedReduction(), seed=SEED, kernels=KernelsConfig(mlp="auto"))
    assert transformer_blocks(model) == list(model.blocks)
    assert isinstance(model.blocks[0].mlp, FusedMlp)
    assert model.blocks[0].mlp is model.blocks[1].mlp


def test_reductions_of_other_names_are_one_line() -> None:
    with pytest.raises(SettingError, match=r'strategy = "grupped": must be one of none, .*; nearest: grouped'):
        parse_reduction({"strategy": "grupped"})
    with pytest.raises(SettingError, match=r"kep = 0.5: unknown setting; allowed: strategy, keep, select_units"):
        parse_reduction({"strategy": "shallow", "kep": 0.5})
