"""The reduced models of timm's registry."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

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


def test_plain_reduced_weights_as_pretrained_are_not_reduced_again(tmp_path: Path) -> None:
    for reduction in (GroupedReduction(), ShallowReduction()):
        source = build_model(TINY, reduction, seed=5)
        torch.save({"state_dict_ema": source.state_dict()}, tmp_path / "model_best.pth.tar")
        overlay = {"file": str(tmp_path / "model_best.pth.tar")}
        name = f"vit_tiny_patch16_224_{reduction.strategy}"
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **ARGUMENTS)
        assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("form", ["ours", "plain"])
@pytest.mark.parametrize(
    "reduction", [GroupedReduction(group_size=3), ShallowReduction(), ThinReduction()], ids=lambda part: part.strategy
)
def test_timm_loads_weights_of_a_reduced_model(reduction: Reduction, form: str, tmp_path: Path) -> None:
    source = build_model(TINY, reduction, seed=5)
    path = tmp_path / f"weights.{'safetensors' if form == 'ours' else 'pth'}"
    if form == "ours":
        write_weights(path, canonical_state(source), model=TINY, reduction=reduction, tied=tied_names(source))
    else:
        torch.save(source.state_dict(), path)
    settings = reduction.model_dump(exclude={"strategy"}, exclude_none=True)
    name = f"{TINY.name}_{reduction.strategy}"
    model = timm.create_model(name, checkpoint_path=str(path), **ARGUMENTS, **settings)
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in model.state_dict().items())
    # And a copy of the model, as timm's EMA makes one.
    copied = copy.deepcopy(model)
    copied.load_state_dict(load_file(path) if form == "ours" else torch.load(path), strict=True)


def test_plain_weights_of_another_reduction_are_refused_with_its_name(tmp_path: Path) -> None:
    torch.save(build_model(TINY, GroupedReduction(group_size=3), seed=5).state_dict(), tmp_path / "grouped.pth")
    overlay = {"file": str(tmp_path / "grouped.pth")}
    with pytest.raises(UserError, match=r'made with reduction {"strategy": "grouped", "group_size": 3}'):
        timm.create_model("vit_tiny_patch16_224_thin", pretrained=True, pretrained_cfg_overlay=overlay, **ARGUMENTS)


@pytest.mark.parametrize(
    ("made_with", "strategy", "difference"),
    [
        (NoReduction(), "grouped", "blocks 0 and 1 have different MLPs, this model's share one"),
        (NoReduction(), "shallow", "the MLP of block 0 has 192 hidden units, this model's has 96"),
        (NoReduction(), "thin", "the MLP of block 0 has 192 hidden units, this model's has 96"),
        (GroupedReduction(group_size=3), "grouped", "blocks 2 and 3 have different MLPs, this model's share one"),
    ],
)
def test_a_checkpoint_that_is_not_reduced_so_is_one_line(
    made_with: Reduction, strategy: str, difference: str, tmp_path: Path
) -> None:
    torch.save(build_model(TINY, made_with, seed=5).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UserError) as error:
        timm.create_model(f"{TINY.name}_{strategy}", checkpoint_path=str(tmp_path / "plain.pth"), **ARGUMENTS)
    assert str(error.value) == (
        f"state dict: is not reduced as this model is ({difference}): write a reduced file by `scalevit reduce`, or "
        "start from this one by scalevit.create_model(weights=FILE)"
    )


def test_a_checkpoint_of_another_model_is_reported_by_torch(tmp_path: Path) -> None:
    other = TINY.model_copy(update={"kwargs": {**TINY.kwargs, "embed_dim": 24}})
    torch.save(build_model(other, NoReduction(), seed=5).state_dict(), tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match="size mismatch for cls_token"):
        timm.create_model(f"{TINY.name}_shallow", checkpoint_path=str(tmp_path / "other.pth"), **ARGUMENTS)


@pytest.mark.parametrize("strategy", ["grouped", "shallow", "thin"])
def test_features_are_those_of_the_whole_model(strategy: str) -> None:
    name = f"{TINY.name}_{strategy}"
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(SEED)
    whole = timm.create_model(name, **ARGUMENTS).eval()
    expected = whole.forward_intermediates(images, indices=[0, 3], intermediates_only=True)
    assert [tuple(each.shape) for each in expected] == [(2, 48, 2, 2)] * 2
    torch.manual_seed(SEED)
    features = timm.create_model(name, features_only=True, out_indices=(0, 3), **ARGUMENTS).eval()
    assert features.feature_info.channels() == [48, 48]
    for ours, theirs in zip(features(images), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert len(features.model.blocks) == 4, "later blocks are dropped, as timm does"
    assert (features.model.blocks[1].mlp is features.model.blocks[0].mlp) == (strategy == "grouped")
    assert len(timm.create_model(name, features_only=True, **ARGUMENTS)(images)) == 3


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
