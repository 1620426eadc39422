"""The counts of parameters and multiply-accumulates: the paper's numbers, and torch's own counter."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.costs import count_costs, model_costs
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.models.reductions.thin import ThinReduction


@pytest.mark.parametrize(
    ("reduction", "parameters", "mlp_parameters", "unique", "paper_gmacs", "gmacs"),
    [
        (NoReduction(), 86_567_656, 56_669_184, 12, "16.867", "17.583"),
        (GroupedReduction(), 58_233_064, 28_334_592, 6, "16.867", "17.583"),
        (ShallowReduction(), 58_237_672, 28_339_200, 12, "11.290", "12.005"),
        (ThinReduction(), 58_237_672, 28_339_200, 12, "11.290", "12.005"),
    ],
    ids=lambda value: getattr(value, "strategy", ""),
)
def test_the_papers_numbers(reduction, parameters, mlp_parameters, unique, paper_gmacs, gmacs) -> None:
    costs = model_costs(ModelConfig(), reduction)
    assert (costs.parameters, costs.mlp_parameters, costs.unique_mlps) == (parameters, mlp_parameters, unique)
    assert (f"{costs.paper_macs / 1e9:.3f}", f"{costs.macs / 1e9:.3f}") == (paper_gmacs, gmacs)


def test_counts_agree_with_torchs_flop_counter() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert 2 * model_costs(ModelConfig(), NoReduction()).matmul_macs == counter.get_total_flops()


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "test_vit3"])
def test_attention_pooling_is_counted(name: str) -> None:
    """The counter fails on a latent that requires gradients, under no_grad."""
    with torch.device("meta"):
        model = timm.create_model(name)
    size = model.patch_embed.img_size[0]
    costs = count_costs(model, size)
    assert costs.parameters == sum(p.numel() for p in model.parameters())
    assert costs.unique_mlps == len(model.blocks)
    # At least what the patch and the blocks' linear layers cost, once for each token.
    weights = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert costs.matmul_macs > weights * model.patch_embed.num_patches


def test_counting_leaves_the_model_as_it_is() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_vit").train()
    count_costs(model, 160)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_image_size_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"^model\.image_size = 8: is not a multiple of the patch size 16: use 16"
    ) as error:
        model_costs(ModelConfig(image_size=8, kwargs={"depth": 1}), NoReduction())
    assert "\n" not in str(error.value)
