"""Which parameters patterns freeze, and what is refused."""

import pytest
from torch import nn

from scalevit.config.model import ModelConfig
from scalevit.errors import SettingError
from scalevit.models.build import build_model
from scalevit.models.freezing import Frozen, freeze
from scalevit.models.reductions.grouped import GroupedReduction

TINY = ModelConfig(
    name="vit_tiny_patch16_224", image_size=32, num_classes=5, kwargs={"embed_dim": 16, "depth": 4, "num_heads": 2}
)


@pytest.fixture
def model() -> nn.Module:
    return build_model(TINY, GroupedReduction(), seed=0, device="meta")


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "prefixes"),
    [
        (["blocks.0"], ("blocks.0.",)),
        (["blocks.[0-1].norm1", "*_embed"], ("blocks.0.norm1", "blocks.1.norm1", "patch_embed", "pos_embed")),
        (["*.bias"], ()),
        ([], ()),
    ],
)
def test_patterns_name_modules_and_parameters(model: nn.Module, patterns: Frozen, prefixes: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_parameters()]
    wanted = {name for name in names if name.startswith(prefixes)}
    if patterns == ["*.bias"]:
        wanted = {name for name in names if name.endswith(".bias")}
    assert frozen(freeze(model, patterns)) == wanted


def test_a_shared_mlp_is_frozen_by_any_of_its_names(model: nn.Module) -> None:
    found = frozen(freeze(model, ["blocks.1.mlp"]))
    assert found == {f"blocks.0.mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}


def test_the_backbone_is_all_but_the_classifier(model: nn.Module) -> None:
    names = {name for name, _ in model.named_parameters()}
    assert names - frozen(freeze(model, "backbone")) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["blocks.0.mpl"], r'frozen = "blocks.0.mpl": names no parameter of this model; nearest: blocks.0.mlp$'),
        (["*"], r'frozen = \["\*"\]: leaves nothing to train$'),
    ],
)
def test_mistakes_are_one_line(model: nn.Module, patterns: Frozen, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        freeze(model, patterns)
