"""Numbers of the analysis on models whose similarity, rank, sensitivity and attention are known."""

import copy
import itertools
import math
import random

import pytest
import torch
from torch import Tensor, nn

from scalevit.analysis.attention import measure_attention
from scalevit.analysis.hidden_units import HiddenUnits, effective_rank, measure_hidden_units, rank_of_weight
from scalevit.analysis.samples import Samples
from scalevit.analysis.sensitivity import (
    half_changes,
    least_damaging_blocks,
    least_damaging_pairs,
    outputs_of,
    pair_changes,
)
from scalevit.analysis.similarity import output_similarities, weight_similarities
from scalevit.config.model import ModelConfig
from scalevit.data.transforms.device import DeviceTransform
from scalevit.models.build import build_model
from scalevit.models.mlps import mlp_views
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.method import FitMethod
from scalevit.models.reductions.none import NoReduction

TINY = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=32,
    num_classes=5,
    kwargs={"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 8},
)
PLAIN = FitMethod(shared="first", units="weights", refit=False)


@pytest.fixture(scope="module")
def samples() -> Samples:
    torch.manual_seed(3)
    finish = DeviceTransform(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Samples(torch.rand(20, 3, 32, 32), torch.arange(20) % 5, (), finish, torch.device("cpu"), 8)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Block 1's MLP is block 0's with its units in another order; half of block 3's hidden units have no effect."""
    network = build_model(TINY, NoReduction(), seed=0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
        (first,), (second,), _, (last,) = mlp_views(network)
        second.module.load_state_dict(first.module.state_dict())
        second.keep(torch.randperm(second.hidden))
        last.output.weight[:, ::2] = 0
    return network


# --- similarity -------------------------------------------------------------------------------------------


def test_equal_neighbours_are_alike_and_others_are_not(model: nn.Module, samples: Samples) -> None:
    weights, outputs = weight_similarities(model), output_similarities(model, samples.image_batches)
    equal, other = weights[0], weights[1]
    assert equal is not None
    assert other is not None
    assert equal.matched == pytest.approx(1, abs=1e-12)
    assert abs(equal.as_listed) < 0.3
    assert other.matched < 0.7
    same, different = outputs[0], outputs[1]
    assert same is not None
    assert different is not None
    # fp32 activations of units in another order.
    assert same.cka == pytest.approx(1, abs=1e-5)
    assert same.relative_error < 1e-5
    assert different.cka < 0.99
    assert different.relative_error > 0.5


def test_cka_and_error_are_those_of_all_activations(model: nn.Module, samples: Samples) -> None:
    """Against the definitions, on stored outputs."""
    pairs: list[tuple[Tensor, Tensor]] = []
    (one,), (other,) = mlp_views(model)[1:3]

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        plain = copy.deepcopy(one.module)
        pairs.append((plain(inputs[0]).flatten(0, 1), output.flatten(0, 1)))

    hook = other.module.register_forward_hook(keep)
    with torch.no_grad():
        for images in samples.image_batches():
            model(images)
    hook.remove()
    x, y = (torch.cat(part).double() for part in zip(*pairs, strict=True))
    found = output_similarities(model, samples.image_batches)[1]
    assert found is not None
    assert found.relative_error == pytest.approx(float((x - y).norm() / y.norm()), rel=1e-5)  # fp32 outputs
    x, y = x - x.mean(0), y - y.mean(0)
    cka = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert found.cka == pytest.approx(float(cka), rel=1e-5)


# --- ranks and importance ---------------------------------------------------------------------------------


def test_effective_ranks() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert rank_of_weight(torch.outer(torch.randn(9), torch.randn(4))) == pytest.approx(1, abs=1e-6)
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert effective_rank(shares) == pytest.approx(math.exp(1.5 * math.log(2)))


def test_hidden_units_and_their_importance(model: nn.Module, samples: Samples) -> None:
    found = measure_hidden_units(model, samples.image_batches)
    (last,) = found[3]
    assert (last.block, last.hidden) == (3, 64)
    assert int((last.importance > 0).sum()) == 32
    assert last.share_for(1.0) == 0.5
    assert torch.equal(last.importance, last.importance.sort(descending=True).values)
    assert all(1 < units.effective_rank <= 64 for (units,) in found)


def test_the_share_of_units_that_have_most_of_the_importance() -> None:
    units = HiddenUnits(0, 5, 1.0, torch.tensor([6.0, 3.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    assert [units.share_for(part) for part in (0.6, 0.9, 0.95, 1.0)] == [0.2, 0.4, 0.6, 0.6]


# --- sensitivity ------------------------------------------------------------------------------------------


def test_what_costs_nothing_changes_nothing(model: nn.Module, samples: Samples) -> None:
    pairs = pair_changes(model, PLAIN, samples.image_batches, samples)
    halves = half_changes(model, PLAIN, samples.image_batches, samples)
    for change in (pairs[0], halves[3]):
        assert change is not None
        assert change.top1 == 0
        assert abs(change.loss) < 1e-5
        assert abs(change.divergence) < 1e-8
    for change in (pairs[1], pairs[2], halves[0], halves[1]):
        assert change is not None
        assert change.divergence > 1e-3


def test_changes_are_those_of_the_reduced_model(model: nn.Module, samples: Samples) -> None:
    reduced = copy.deepcopy(model)
    reduced.blocks[2].mlp = reduced.blocks[1].mlp
    before, after = outputs_of(model, samples), outputs_of(reduced, samples)
    expected = torch.nn.functional.kl_div(
        after.log_probabilities, before.log_probabilities, log_target=True, reduction="batchmean"
    )
    change = pair_changes(model, PLAIN, samples.image_batches, samples)[1]
    assert change is not None
    assert change.divergence == pytest.approx(float(expected), rel=1e-9)
    assert change.loss == pytest.approx(after.loss - before.loss, abs=1e-12)
    assert change.top1 == after.top1 - before.top1


def test_blocks_that_share_already_are_no_pair(samples: Samples) -> None:
    grouped = build_model(TINY, GroupedReduction(), seed=0).eval()
    changes = pair_changes(grouped, PLAIN, samples.image_batches, samples)
    assert [change is None for change in changes] == [True, False, True]


def test_pairs_are_chosen_with_the_smallest_sum() -> None:
    """Against every choice."""
    generator = random.Random(0)
    for depth, count in ((6, 1), (6, 2), (7, 3), (8, 3), (8, 4)):
        values = [generator.random() for _ in range(depth - 1)]
        possible = [
            chosen
            for chosen in itertools.combinations(range(depth - 1), count)
            if all(b - a > 1 for a, b in itertools.pairwise(chosen))
        ]
        best = min(possible, key=lambda chosen: sum(values[block] for block in chosen))
        assert least_damaging_pairs(values, count) == [[block, block + 1] for block in best]
    assert least_damaging_pairs([0.1, None, 0.3], 2) == [[0, 1], [2, 3]]
    assert least_damaging_pairs([0.1, 0.2, 0.3], 3) is None


def test_blocks_are_chosen_by_the_smallest_changes() -> None:
    assert least_damaging_blocks([0.3, None, 0.1, 0.2], 2) == [2, 3]
    assert least_damaging_blocks([0.3, None, 0.1], 3) is None


# --- attention --------------------------------------------------------------------------------------------


def test_even_attention_has_the_mean_distance(model: nn.Module, samples: Samples) -> None:
    even = copy.deepcopy(model)
    with torch.no_grad():
        for block in even.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
    centres = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)) * 8
    expected = float(torch.cdist(centres, centres).mean())
    found = measure_attention(even, samples.image_batches, maps=3)
    assert found is not None
    assert [attention.block for attention in found] == [0, 1, 2, 3]
    for attention in found:
        assert attention.distances.tolist() == pytest.approx([expected] * 2, rel=1e-5)
        assert attention.maps.shape == (3, 4, 4)
        # The class token attends to itself and 16 patches.
        torch.testing.assert_close(attention.maps, torch.full_like(attention.maps, 1 / 17), rtol=0, atol=1e-6)
    assert all(
        block.attn.fused_attn == other.attn.fused_attn for block, other in zip(even.blocks, model.blocks, strict=True)
    )


def test_distances_and_maps_are_those_of_the_softmax(model: nn.Module, samples: Samples) -> None:
    """Written out from the queries and keys of the first block."""
    images = next(iter(samples.image_batches()))
    block, size = model.blocks[0], len(images)
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        qkv = block.attn.qkv(block.norm1(tokens)).reshape(size, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        attention = (qkv[0] @ qkv[1].transpose(-1, -2) / 8**0.5).softmax(-1).double()
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).double() * 8
    between = attention[:, :, 1:, 1:]
    distances = (between / between.sum(-1, keepdim=True) * torch.cdist(places, places)).sum(-1).mean((0, 2))
    found = measure_attention(model, lambda: [images])
    assert found is not None
    torch.testing.assert_close(found[0].distances, distances, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0].maps[1], attention[1, :, 0, 1:].mean(0).reshape(4, 4), rtol=1e-5, atol=1e-7)
    assert found[0].distances.std() > 0


def test_a_model_without_patches_of_its_own_has_no_attention_maps(samples: Samples) -> None:
    assert measure_attention(nn.Sequential(nn.Flatten(), nn.LazyLinear(5)).eval(), samples.image_batches) is None
