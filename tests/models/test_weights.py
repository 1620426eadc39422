"""Weights files: one name per tensor, tying restored, never reduced twice."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.build import build_model
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.models.weights.coverage import Coverage
from scalevit.models.weights.read import read_classes, read_weights
from scalevit.models.weights.write import write_weights
from scalevit.tying import canonical_state, tied_names

MODEL = ModelConfig(
    name="vit_tiny_patch16_224", image_size=32, num_classes=7, kwargs={"embed_dim": 48, "depth": 4, "num_heads": 3}
)


def saved(tmp_path: Path, reduction, seed: int = 5) -> tuple[Path, dict[str, torch.Tensor]]:
    model = build_model(MODEL, reduction, seed=seed)
    path = tmp_path / "weights.safetensors"
    write_weights(path, canonical_state(model), model=MODEL, reduction=reduction, tied=tied_names(model))
    return path, model.state_dict()


def initialised_from(path: Path, reduction, **changes) -> dict[str, torch.Tensor]:
    model = MODEL.model_copy(update={"initial_weights": str(path), **changes})
    return build_model(model, reduction, seed=99).state_dict()


@pytest.mark.parametrize("reduction", [NoReduction(), GroupedReduction(), ShallowReduction()], ids=lambda r: r.strategy)
def test_a_round_trip_gives_the_same_weights_not_reduced_twice(tmp_path: Path, reduction) -> None:
    path, expected = saved(tmp_path, reduction)
    loaded = initialised_from(path, reduction)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def test_a_grouped_file_holds_each_tensor_once_and_names_the_ties(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, GroupedReduction())
    weights = read_weights(path)
    assert "blocks.1.mlp.fc1.weight" not in weights.tensors
    assert weights.tied["blocks.1.mlp.fc1.weight"] == "blocks.0.mlp.fc1.weight"
    assert weights.reduction == GroupedReduction()
    assert weights.described


def test_a_weights_file_has_the_mode_of_other_files(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, NoReduction())
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
    assert [each.name for each in tmp_path.iterdir() if each.suffix == ".tmp"] == []


def test_a_file_that_cannot_be_written_is_one_line_with_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "no" / "weights.safetensors"
    with pytest.raises(UserError) as error:
        write_weights(path, {"a": torch.zeros(1)}, model=MODEL, reduction=NoReduction(), tied={})
    assert str(error.value) == f"weights {path}: cannot be written (No such file or directory)"


@pytest.mark.parametrize(
    ("made_with", "wanted"),
    [
        (GroupedReduction(), GroupedReduction(group_size=2)),
        (GroupedReduction(scale=0.5), GroupedReduction(groups=[[0, 1], [3, 2]])),
        (ShallowReduction(), ShallowReduction(select_units="importance")),
    ],
)
def test_reductions_are_compared_by_structure(tmp_path: Path, made_with, wanted) -> None:
    path, expected = saved(tmp_path, made_with)
    loaded = initialised_from(path, wanted)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def test_plain_timm_weights_are_reduced_after_loading(tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = timm.create_model(MODEL.name, num_classes=7, img_size=32, **MODEL.kwargs)
    path = tmp_path / "plain.pth"
    torch.save({"state_dict": plain.state_dict()}, path)
    loaded = initialised_from(path, GroupedReduction(scale=0.5))
    assert torch.equal(loaded["blocks.1.mlp.fc1.weight"], plain.state_dict()["blocks.0.mlp.fc1.weight"] * 0.5)
    assert torch.equal(loaded["blocks.1.attn.qkv.weight"], plain.state_dict()["blocks.1.attn.qkv.weight"])


def test_a_classifier_of_another_size_starts_anew(tmp_path: Path) -> None:
    path, before = saved(tmp_path, GroupedReduction())
    loaded = initialised_from(path, GroupedReduction(), num_classes=3)
    assert loaded["head.weight"].shape == (3, 48)
    assert torch.equal(loaded["norm.weight"], before["norm.weight"])


def test_what_weights_cover(tmp_path: Path) -> None:
    path, state = saved(tmp_path, GroupedReduction())

    def covered(**changes) -> Coverage | None:
        model = MODEL.model_copy(update={"initial_weights": str(path), **changes})
        found: list[Coverage] = []
        build_model(model, GroupedReduction(), seed=0, device="meta", on_weights=found.append)
        return found[0] if found else None

    assert covered(initial_weights=None) is None
    whole = len(read_weights(path).tensors)
    assert whole < len(state), "shared tensors are counted once"
    assert covered() == Coverage(whole, already_reduced=True, fresh=(), resampled=())
    assert str(covered()) == f"all {whole} tensors"
    assert covered(image_size=48) == Coverage(whole, already_reduced=True, fresh=(), resampled=("pos_embed",))
    other = covered(num_classes=3)
    assert other == Coverage(whole - 2, already_reduced=True, fresh=("head.bias", "head.weight"), resampled=())


def test_a_missing_classifier_keeps_its_initialisation_unless_it_is_needed(tmp_path: Path) -> None:
    backbone = timm.create_model(MODEL.name, num_classes=0, img_size=32, **MODEL.kwargs).state_dict()
    path = tmp_path / "backbone.pth"
    torch.save(backbone, path)
    loaded = initialised_from(path, ShallowReduction())
    assert torch.equal(loaded["norm.weight"], backbone["norm.weight"])
    assert loaded["head.weight"].shape == (7, 48)
    with pytest.raises(UserError, match=r"lacks head\.bias and 1 more"):
        build_model(
            MODEL.model_copy(update={"initial_weights": str(path)}), NoReduction(), seed=0, need_classifier=True
        )


@pytest.mark.parametrize("reduction", [NoReduction(), GroupedReduction(), ShallowReduction()], ids=lambda r: r.strategy)
def test_another_image_size_resamples_the_position_embeddings(tmp_path: Path, reduction) -> None:
    path, before = saved(tmp_path, reduction)
    loaded = initialised_from(path, reduction, image_size=48)
    assert before["pos_embed"].shape == (1, 5, 48)
    assert loaded["pos_embed"].shape == (1, 10, 48)
    assert all(torch.equal(loaded[name], before[name]) for name in before if name != "pos_embed")


def test_names_of_classes_are_in_the_file(tmp_path: Path) -> None:
    network = build_model(MODEL, NoReduction(), seed=0)
    path = tmp_path / "named.safetensors"
    tensors = dict(network.named_parameters())
    write_weights(path, tensors, model=MODEL, reduction=NoReduction(), tied={}, classes=["cat", "dog"])
    assert read_classes(path) == ("cat", "dog")
    write_weights(path, tensors, model=MODEL, reduction=NoReduction(), tied={})
    assert read_classes(path) is None
    torch.save({}, tmp_path / "other.pth")
    assert read_classes(tmp_path / "other.pth") is None


def test_a_file_that_does_not_fit_names_its_model(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, NoReduction())
    other_tool = tmp_path / "timm.pth.tar"
    torch.save({"arch": "vit_small_patch16_224", "state_dict": {"cls_token": torch.zeros(1)}}, other_tool)
    stated = "weights are of vit_tiny_patch16_224 embed_dim=48 depth=4 num_heads=3, this model is vit_base_patch16_224"
    base = {"name": "vit_base_patch16_224"}
    for source, changes, part in (
        (path, {**base, "kwargs": {}}, stated),
        (path, {**base, "kwargs": {**MODEL.kwargs, "embed_dim": 96}}, stated),
        (other_tool, base, "weights are of vit_small_patch16_224, this model is vit_base_patch16_224"),
    ):
        with pytest.raises(UserError) as error:
            initialised_from(source, NoReduction(), **changes)
        assert str(error.value).endswith(part)
    grouped, _ = saved(tmp_path, GroupedReduction(group_size=4))
    with pytest.raises(
        UserError, match=r"another structure than .*; weights are of vit_tiny.*, this model is vit_base"
    ):
        initialised_from(grouped, GroupedReduction(group_size=3), kwargs={**MODEL.kwargs, "depth": 6}, **base)


def test_a_file_of_the_same_model_does_not_name_it(tmp_path: Path) -> None:
    """What differs is the reduction or the number of classes, which the message has already."""
    path, _ = saved(tmp_path, GroupedReduction())
    other = {**MODEL.kwargs, "embed_dim": 96}
    for reduction, changes, end in (
        (ShallowReduction(), {}, 'another structure than {"strategy": "shallow"}'),
        (ShallowReduction(), {"num_classes": 3}, 'another structure than {"strategy": "shallow"}'),
        (
            ShallowReduction(),
            {"kwargs": other},
            "; weights are of vit_tiny_patch16_224 embed_dim=48 depth=4 num_heads=3",
        ),
        (
            GroupedReduction(),
            {"kwargs": other},
            "; weights are of vit_tiny_patch16_224 embed_dim=48 depth=4 num_heads=3",
        ),
    ):
        with pytest.raises(UserError) as error:
            initialised_from(path, reduction, **changes)
        assert str(error.value).endswith(end)
    model = MODEL.model_copy(update={"initial_weights": str(path), "num_classes": 3})
    with pytest.raises(UserError, match=r"have a classifier of 7 classes, but model\.num_classes = 3$"):
        build_model(model, GroupedReduction(), seed=1, need_classifier=True)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, GroupedReduction())
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:1000])
    code = tmp_path / "code.pth"
    torch.save({"state_dict": {"a": print}}, code)
    unknown = tmp_path / "unknown.safetensors"
    metadata = {"scalevit": json.dumps({"reduction": {"strategy": "folded"}})}
    save_file({"a": torch.zeros(1)}, unknown, metadata=metadata)
    cases = [
        (path, NoReduction(), {}, "made with reduction"),
        (path, GroupedReduction(group_size=4), {}, "made with reduction"),
        (path, GroupedReduction(), {"kwargs": {**MODEL.kwargs, "depth": 6}}, "lacks"),
        (path, GroupedReduction(), {"kwargs": {**MODEL.kwargs, "embed_dim": 96}}, "shape"),
        (tmp_path / "missing.safetensors", NoReduction(), {}, "no such file"),
        (damaged, NoReduction(), {}, "is cut or empty: copy or download it again"),
        (code, NoReduction(), {}, "cannot be read"),
        (unknown, NoReduction(), {}, "made with an unknown reduction"),
    ]
    for source, reduction, changes, part in cases:
        with pytest.raises(UserError) as error:
            initialised_from(source, reduction, **changes)
        assert part in str(error.value)
        assert "\n" not in str(error.value)
