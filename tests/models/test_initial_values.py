"""Leaf by leaf initial values: timm's distributions, the reduction's scale and width, one leaf in memory at a time."""

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.build import build_model
from scalevit.models.meta_init import initial_values
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.models.reductions.thin import ThinReduction
from scalevit.models.weights.write import write_weights
from scalevit.tying import tied_names

SIZES: dict[str, Any] = {"embed_dim": 64, "depth": 4, "num_heads": 4}
MODELS = {
    "vit": ModelConfig(name="vit_tiny_patch16_224", image_size=32, num_classes=50, kwargs=SIZES),
    "jax": ModelConfig(
        name="vit_tiny_patch16_224", image_size=32, num_classes=50, kwargs={**SIZES, "weight_init": "jax_nlhb"}
    ),
    "deit3": ModelConfig(name="deit3_small_patch16_224", image_size=32, num_classes=50, kwargs=SIZES),
    "dinov2": ModelConfig(name="vit_small_patch14_reg4_dinov2", image_size=28, num_classes=50, kwargs=SIZES),
    "distilled": ModelConfig(name="deit_tiny_distilled_patch16_224", image_size=32, num_classes=50, kwargs=SIZES),
    "pooled": ModelConfig(
        name="vit_tiny_patch16_224", image_size=32, num_classes=50, kwargs={**SIZES, "global_pool": "map"}
    ),
}
REDUCTIONS = {
    "none": NoReduction(),
    "grouped": GroupedReduction(),
    "shallow": ShallowReduction(),
    "thin": ThinReduction(),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_they_have_timms_distributions(model: str, reduction: str) -> None:
    expected = build_model(MODELS[model], REDUCTIONS[reduction], seed=1)
    values = {name: tensor.clone() for name, tensor in initial_values(MODELS[model], REDUCTIONS[reduction], seed=1)}
    whole = {name: tensor.detach() for name, tensor in [*expected.named_parameters(), *expected.named_buffers()]}
    assert values.keys() == whole.keys()
    for name, tensor in whole.items():
        assert_like(values[name], tensor, name)


def assert_like(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Constants alike; random values by their spread, whose own standard error is 1 / sqrt(2 n), and by their mean."""
    assert ours.shape == theirs.shape, name
    if theirs.unique().numel() == 1:
        assert torch.equal(ours, theirs), name
        return
    assert not torch.equal(ours, theirs), "drawn, not copied"
    error = 5 * math.sqrt(2) / math.sqrt(2 * ours.numel())
    assert abs(ours.std() / theirs.std() - 1) < error, f"{name}: {ours.std():.3g} for {theirs.std():.3g}"
    assert abs(ours.mean() - theirs.mean()) < 5 * theirs.std() * math.sqrt(2 / ours.numel()), name


def leaf_of(name: str) -> str:
    mlp, found, _ = name.partition(".mlp.")
    return f"{mlp}.mlp" if found else name.rpartition(".")[0]


def test_they_are_drawn_leaf_by_leaf() -> None:
    alive: dict[str, Any] = {}
    most = 0
    for name, tensor in initial_values(MODELS["vit"], GroupedReduction(), seed=1):
        alive[name] = weakref.ref(tensor.untyped_storage())
        leaves = {leaf_of(key) for key, ref in alive.items() if ref() is not None}
        most = max(most, len(leaves))
    assert most == 1


def test_a_leafs_values_depend_on_its_name_and_the_seed_alone() -> None:
    torch.manual_seed(0)
    full = {name: tensor.clone() for name, tensor in initial_values(MODELS["vit"], NoReduction(), seed=1)}
    torch.manual_seed(9)
    shallower = MODELS["vit"].model_copy(update={"kwargs": {**SIZES, "depth": 2}})
    part = {name: tensor.clone() for name, tensor in initial_values(shallower, NoReduction(), seed=1)}
    other = {name: tensor.clone() for name, tensor in initial_values(shallower, NoReduction(), seed=2)}
    assert all(torch.equal(tensor, full[name]) for name, tensor in part.items())
    assert not torch.equal(other["pos_embed"], full["pos_embed"])
    assert not torch.equal(full["blocks.0.attn.qkv.weight"], full["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("reduced_file", [False, True])
def test_weights_of_a_file_take_their_place(tmp_path: Path, reduced_file: bool) -> None:
    made_with = GroupedReduction() if reduced_file else NoReduction()
    source = build_model(MODELS["vit"], made_with, seed=5)
    path = tmp_path / "w.safetensors"
    write_weights(
        path, dict(source.named_parameters()), model=MODELS["vit"], reduction=made_with, tied=tied_names(source)
    )
    model = MODELS["vit"].model_copy(update={"initial_weights": str(path)})
    expected = dict(build_model(model, GroupedReduction(), seed=1).named_parameters())
    values = {name: tensor.clone() for name, tensor in initial_values(model, GroupedReduction(), seed=1)}
    assert values.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(values[name], tensor), name


def test_what_cannot_be_initialised_by_leaf_is_one_line() -> None:
    model = MODELS["vit"].model_copy(update={"kwargs": {**SIZES, "fix_init": True}})
    with pytest.raises(UserError, match="fix_init"):
        list(initial_values(model, NoReduction(), seed=1))
