"""MLPs of every kind, narrowed, scaled, shared and removed."""

from functools import partial

import pytest
import timm
import torch
from timm.layers import GluMlp, LayerNorm, Mlp, SwiGLU, SwiGLUPacked
from torch import Tensor, nn

from scalevit.errors import UserError
from scalevit.models.mlps import MlpView, NoMlp, mlp_places, mlp_views, transformer_blocks
from scalevit.models.reductions.apply import reduce_model
from scalevit.models.reductions.grouped import GroupedReduction

WIDTH, HIDDEN = 8, 12
UNITS = torch.tensor([1, 2, 7, 4, 11])
KINDS = {
    "plain": partial(Mlp, WIDTH, HIDDEN),
    "plain without bias": partial(Mlp, WIDTH, HIDDEN, bias=False),
    "gate last": partial(GluMlp, WIDTH, 2 * HIDDEN),
    "gate first": partial(SwiGLUPacked, WIDTH, 2 * HIDDEN),
    "separate": partial(SwiGLU, WIDTH, HIDDEN),
    "with norm": partial(SwiGLU, WIDTH, HIDDEN, norm_layer=LayerNorm),
}


@pytest.fixture(params=KINDS)
def mlp(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    module = KINDS[request.param]().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def tokens() -> Tensor:
    return torch.randn(3, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def hidden_units(view: MlpView, x: Tensor) -> Tensor:
    """What the hidden units compute, before a norm."""
    seen = []
    hook = view.module.drop1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    view.module(x)
    hook.remove()
    return seen[0]


def test_narrowing_keeps_the_chosen_units(mlp: nn.Module) -> None:
    view = MlpView(mlp)
    assert (view.width, view.hidden) == (WIDTH, HIDDEN)
    before, columns = hidden_units(view, tokens()), view.output.weight.clone()
    view.keep(UNITS)
    assert view.hidden == len(UNITS)
    # Equal up to the order of summation, in fp64.
    torch.testing.assert_close(hidden_units(view, tokens()), before[..., UNITS], rtol=1e-12, atol=1e-12)
    assert torch.equal(view.output.weight, columns[:, UNITS])
    assert mlp(tokens()).shape == tokens().shape


def test_the_units_of_largest_importance_are_kept(mlp: nn.Module) -> None:
    view = MlpView(mlp)
    columns = view.output.weight.clone()
    strongest = view.importance().argsort(descending=True)[:4].sort().values
    view.narrow(4, select_units="importance")
    assert torch.equal(view.output.weight, columns[:, strongest])


@pytest.mark.parametrize("kind", ["gate last", "gate first", "separate"])
def test_the_output_of_a_gated_mlp_is_scaled_exactly(kind: str) -> None:
    torch.manual_seed(0)
    module = KINDS[kind]().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    before = module(tokens()) - module.fc2.bias
    MlpView(module).scale(0.5)
    torch.testing.assert_close(module(tokens()) - module.fc2.bias, before / 4, rtol=1e-12, atol=1e-12)


def test_a_norm_that_is_not_known_is_refused() -> None:
    view = MlpView(Mlp(WIDTH, HIDDEN, norm_layer=nn.BatchNorm1d))
    with pytest.raises(UserError, match="an MLP with a BatchNorm1d between its layers cannot be narrowed"):
        view.keep(UNITS)


def test_several_mlps_of_a_block_are_shared_one_by_one() -> None:
    model = timm.create_model("vit_small_patch16_18x2_224", depth=2, embed_dim=32, num_heads=2, img_size=32)
    assert [len(views) for views in mlp_views(model)] == [2, 2]
    reduce_model(model, GroupedReduction())
    first, second = (mlp_places(block) for block in transformer_blocks(model))
    assert [place.module for place in first] == [place.module for place in second]
    assert first[0].module is not first[1].module


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_small_patch16_18x2_224", "vit_base_patch16_rpn_224"])
def test_a_removed_mlp_adds_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, depth=1, embed_dim=32, num_heads=2, img_size=32, init_values=None).eval()
    block = transformer_blocks(model)[0]
    x = torch.randn(2, 5, 32)
    for place in mlp_places(block):
        nn.init.zeros_(place.module.fc2.weight)
        nn.init.zeros_(place.module.fc2.bias)
    expected = block(x)
    for place in mlp_places(block):
        place.remove()
    assert all(isinstance(place.module, NoMlp) for place in mlp_places(block))
    assert torch.equal(block(x), expected)
    names = [key for key, _ in block.named_parameters() if "norm2" in key or "ffns" in key]
    assert not names


def test_blocks_of_stages_are_in_the_order_of_the_forward() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 4), num_heads=(1, 2), embed_dim=16)
    assert [views[0].width for views in mlp_views(swin)] == [16, 16, 32, 32, 32, 32]
    hybrid = timm.create_model("vit_small_r26_s32_224", depth=2)
    assert transformer_blocks(hybrid) == list(hybrid.blocks)  # and not those of its ResNet
