"""The public functions: build, reduce, load weights."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import scalevit
from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.build import build_model
from scalevit.models.reductions.grouped import GroupedReduction

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def logits(model: torch.nn.Module) -> torch.Tensor:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(images)


def test_a_created_model_is_the_one_that_a_run_trains() -> None:
    settings = {key: SMALL[key] for key in ("embed_dim", "depth", "num_heads")}
    config = ModelConfig(name=NAME, image_size=32, num_classes=5, drop_path=0.0, kwargs=settings)
    run = build_model(config, GroupedReduction(group_size=4), seed=3)
    created = scalevit.create_model(NAME, "grouped", group_size=4, seed=3, **SMALL)
    assert torch.equal(logits(created), logits(run))
    assert sum(p.numel() for p in created.parameters()) == sum(p.numel() for p in run.parameters())


def test_defaults_are_those_of_the_timm_model() -> None:
    model = scalevit.create_model("vit_small_patch14_dinov2", "none", depth=1)
    assert model.patch_embed.img_size == (518, 518)
    assert model.num_classes == 1000


def test_reducing_a_built_model_equals_creating_it() -> None:
    built = scalevit.create_model(NAME, "none", seed=3, **SMALL)
    reduced = scalevit.reduce_model(built, "grouped", group_size=2)
    assert reduced is built
    assert torch.equal(logits(reduced), logits(scalevit.create_model(NAME, "grouped", group_size=2, seed=3, **SMALL)))


@pytest.mark.parametrize("name", [NAME, "deit3_small_patch16_224"])
def test_a_model_of_timm_is_reduced(name: str) -> None:
    model = scalevit.reduce_model(timm.create_model(name, img_size=32, depth=2), "shallow", keep=0.25)
    assert model.blocks[0].mlp.fc1.out_features == int(0.25 * 4 * model.embed_dim)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_back(suffix: str, tmp_path: Path) -> None:
    made = scalevit.create_model(NAME, "grouped", seed=1, **SMALL)
    file = tmp_path / f"weights{suffix}"
    state = made.state_dict()
    if suffix == ".pth":
        torch.save(state, file)  # lists a shared tensor once for each block
    else:
        save_file({name: state[name].clone() for name, _ in made.named_parameters()}, file)
    other = scalevit.create_model(NAME, "grouped", seed=2, **SMALL)
    assert not torch.equal(logits(other), logits(made))
    assert scalevit.load_weights(other, file) is other
    assert torch.equal(logits(other), logits(made))


def test_weights_of_another_structure_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "unreduced.pth"
    torch.save(scalevit.create_model(NAME, "none", **SMALL).state_dict(), file)
    grouped = scalevit.create_model(NAME, "grouped", seed=1, **SMALL)
    before = logits(grouped)
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\..* differ, but this model shares them"):
        scalevit.load_weights(grouped, file)
    with pytest.raises(UserError, match="has shape"):
        scalevit.load_weights(scalevit.create_model(NAME, "thin", **SMALL), file)
    with pytest.raises(UserError, match=r": has blocks\.3\.\S+ and \d+ more, which this model lacks$"):
        scalevit.load_weights(scalevit.create_model(NAME, "none", **{**SMALL, "depth": 3}), file)
    with pytest.raises(UserError, match=r"lacks blocks\.4\."):
        scalevit.load_weights(scalevit.create_model(NAME, "none", **{**SMALL, "depth": 5}), file)
    torch.save({"arch": "vit_small_patch16_224", "state_dict": torch.load(file)}, file)
    with pytest.raises(UserError, match=rf"lacks .*; weights are of vit_small_patch16_224, this model is {NAME}$"):
        scalevit.load_weights(scalevit.create_model(NAME, "none", **{**SMALL, "depth": 5}), file)
    assert torch.equal(logits(grouped), before), "nothing was changed"


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: scalevit.create_model(NAME, "grupped"), ["grupped", "nearest: grouped"]),
        (lambda: scalevit.create_model("vit_tny_patch16_224"), ["vit_tny_patch16_224", "nearest"]),
        (lambda: scalevit.create_model(NAME, group_size=1), ["group_size = 1", "greater than or equal to 2"]),
        (lambda: scalevit.create_model(NAME, num_classes=0), ["num_classes = 0"]),
        (lambda: scalevit.create_model(NAME, kept=0.5), ["kept"]),
        (lambda: scalevit.reduce_model(timm.create_model(NAME), kept=0.5), ["kept = 0.5", "group_size"]),
        (lambda: scalevit.reduce_model(timm.create_model(NAME), "thin"), ["thin", "create_model"]),
        (lambda: scalevit.reduce_model(torch.nn.Linear(1, 1)), ["Linear"]),
        (lambda: scalevit.load_weights(torch.nn.Linear(1, 1), "no.pth"), ["no.pth"]),
    ],
)
def test_mistakes_are_one_line(call, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(("channels", "factor"), [(1, 1.0), (4, 3 / 4)])
@pytest.mark.parametrize("reduction", ["none", "grouped"])
def test_filters_of_rgb_weights_fit_other_channels(
    channels: int, factor: float, reduction: str, tmp_path: Path
) -> None:
    """As timm's `adapt_input_conv`: summed for one channel, repeated and scaled for more than three."""
    source = scalevit.create_model(NAME, reduction, seed=5, **SMALL)
    torch.save(source.state_dict(), tmp_path / "rgb.pth")
    filters = source.patch_embed.proj.weight
    expected = filters.sum(1, keepdim=True) if channels == 1 else torch.cat([filters, filters[:, :1]], 1) * factor
    created = scalevit.create_model(NAME, reduction, weights=tmp_path / "rgb.pth", in_chans=channels, **SMALL)
    other = scalevit.create_model(NAME, reduction, seed=7, in_chans=channels, **SMALL)
    for model in (created, scalevit.load_weights(other, tmp_path / "rgb.pth")):
        torch.testing.assert_close(model.patch_embed.proj.weight, expected)
        assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
        assert model(torch.zeros(1, channels, 32, 32)).shape == (1, 5)


def test_the_ema_of_a_checkpoint_is_loaded_unless_its_weights_are_wanted(tmp_path: Path) -> None:
    sets = [scalevit.create_model(NAME, "grouped", seed=seed, **SMALL) for seed in (5, 6)]
    content = dict(zip(("state_dict", "state_dict_ema"), [each.state_dict() for each in sets], strict=True))
    torch.save(content, tmp_path / "last.pth.tar")
    model = scalevit.create_model(NAME, "grouped", **SMALL)
    assert torch.equal(logits(scalevit.load_weights(model, tmp_path / "last.pth.tar")), logits(sets[1]))
    scalevit.load_weights(model, tmp_path / "last.pth.tar", weights_set="weights")
    assert torch.equal(logits(model), logits(sets[0]))
    created = scalevit.create_model(NAME, "grouped", weights=tmp_path / "last.pth.tar", weights_set="weights", **SMALL)
    assert torch.equal(logits(created), logits(sets[0]))


def test_our_weights_file_is_a_state_dict_of_the_model(tmp_path: Path) -> None:
    """With each shared tensor under one name, which `load_state_dict` of a grouped model takes."""
    source = scalevit.create_model(NAME, "grouped", seed=5, **SMALL)
    model = scalevit.create_model(NAME, "grouped", seed=6, **SMALL)
    model.load_state_dict({name: parameter.detach() for name, parameter in source.named_parameters()}, strict=True)
    assert torch.equal(logits(model), logits(source))
    with pytest.raises(RuntimeError, match="but this model shares them"):
        model.load_state_dict(scalevit.create_model(NAME, "none", seed=5, **SMALL).state_dict())
