"""The reduced models of timm's registry."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import scalevit.models.timm_names  # noqa: F401 (registers the reduced models)
from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.build import build_model
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.models.reductions.thin import ThinReduction
from scalevit.models.weights.write import write_weights
from scalevit.tying import canonical_state, tied_names

TINY = ModelConfig(
    name="vit_tiny_patch16_224", image_size=32, num_classes=7, kwargs={"embed_dim": 48, "depth": 6, "num_heads": 3}
)
ARGUMENTS: dict[str, Any] = {"num_classes": 7, "img_size": 32, "drop_path_rate": 0.1, **TINY.kwargs}
SEED = 42


@pytest.mark.parametrize(
    "reduction",
    [GroupedReduction(group_size=3), ShallowReduction(keep=0.25), ThinReduction(mlp_ratio=1.0)],
    ids=lambda reduction: reduction.strategy,
)
def test_registered_models_equal_the_built_ones(reduction: Reduction) -> None:
    torch.manual_seed(SEED)
    settings = reduction.model_dump(exclude={"strategy"})
    ours = timm.create_model(f"{TINY.name}_{reduction.strategy}", **ARGUMENTS, **settings).state_dict()
    expected = build_model(TINY, reduction, seed=SEED).state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def test_weights_as_pretrained_are_reduced_once(tmp_path: Path) -> None:
    for made_with in (NoReduction(), GroupedReduction()):
        source = build_model(TINY, made_with, seed=5)
        path = tmp_path / f"{made_with.strategy}.safetensors"
        write_weights(path, canonical_state(source), model=TINY, reduction=made_with, tied=tied_names(source))
        for overlay in ({"file": str(path), "num_classes": -1}, {"file": str(path), "num_classes": 7}):
            model = timm.create_model(
                "vit_tiny_patch16_224_grouped", pretrained=True, pretrained_cfg_overlay=overlay, **ARGUMENTS
            )
            expected = source.blocks[0].mlp.fc1.weight * (1 if made_with.strategy == "grouped" else 2**-0.5)
            assert model.blocks[1].mlp is model.blocks[0].mlp
            torch.testing.assert_close(model.blocks[1].mlp.fc1.weight, expected)


@pytest.mark.parametrize(
    ("strategy", "settings", "part"),
    [
        ("grouped", {"group_size": 1}, "group_size = 1: Input should be greater than or equal to 2"),
        ("grouped", {"group_size": 4}, "group_size = 4: does not divide the model's 6 blocks"),
        ("grouped", {"group_size": 2, "groups": [[0, 1]]}, "give group_size or groups, not both"),
        ("shallow", {"keep": "half"}, 'keep = "half": Input should be a valid number'),
        ("shallow", {"select_units": "last"}, "'first' or 'importance'"),
        ("thin", {"mlp_ratio": -1}, "mlp_ratio = -1"),
    ],
)
def test_a_wrong_setting_is_one_line(strategy: str, settings: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as error:
        timm.create_model(f"{TINY.name}_{strategy}", **ARGUMENTS, **settings)
    assert part in str(error.value)
    assert "\n" not in str(error.value)
