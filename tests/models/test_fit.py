"""Reduced copies of trained models: cases whose exact result is known, the fit against all activations at once."""

import copy
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.build import build_model
from scalevit.models.mlps import mlp_views
from scalevit.models.reductions.apply import parse_reduction, reduce_model
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.fit import reduce_trained
from scalevit.models.reductions.least_squares import Moments, refitted
from scalevit.models.reductions.method import FitMethod
from scalevit.models.unit_matching import matching_units
from scalevit.models.watching import watch_mlps
from scalevit.tying import canonical_state, tied_names

KWARGS = {"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 8}
PLAIN = ModelConfig(name="vit_tiny_patch16_224", image_size=32, num_classes=5, kwargs=KWARGS)
# Gate and value packed in one layer, with layer scale; in two layers, with a norm before the last one.
PACKED = ModelConfig(name="vit_giant_patch14_dinov2", image_size=32, num_classes=5, kwargs={**KWARGS, "mlp_ratio": 4.0})
SEPARATE = ModelConfig(name="eva02_base_patch14_224", image_size=32, num_classes=5, kwargs=KWARGS)
MODELS = pytest.mark.parametrize("config", [PLAIN, PACKED, SEPARATE], ids=["plain", "packed", "separate"])
GROUPED, SHALLOW = {"strategy": "grouped"}, {"strategy": "shallow"}
WITHOUT_FIT = FitMethod(refit=False)


def trained(config: ModelConfig, reduction: dict[str, Any] | None = None) -> nn.Module:
    """A model with weights of a size that makes every MLP matter."""
    model = build_model(config, parse_reduction(reduction or {"strategy": "none"}), seed=0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def example(reduction: dict[str, Any], config: ModelConfig = PLAIN) -> nn.Module:
    return build_model(config, parse_reduction(reduction), seed=0, device="meta")


def images() -> Iterator[Tensor]:
    torch.manual_seed(2)
    return iter(torch.randn(24, 3, 32, 32).split(10))


def no_images() -> Iterator[Tensor]:
    raise AssertionError("this method needs no images")


@torch.no_grad()
def assert_same_outputs(model: nn.Module, other: nn.Module, tolerance: float = 2e-5) -> None:
    for batch in images():
        expected = model(batch)
        torch.testing.assert_close(other(batch), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def with_equal_neighbours(model: nn.Module, *, shuffled: bool) -> nn.Module:
    """Each odd block's MLP is the one before it, perhaps with its hidden units in another order."""
    for number, views in enumerate(mlp_views(model)):
        if number % 2:
            (before,), (view,) = mlp_views(model)[number - 1], views
            view.module.load_state_dict(before.module.state_dict())
            if shuffled:
                view.keep(torch.randperm(view.hidden))
    return model


# --- sharing ----------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("method", [FitMethod(shared="first"), FitMethod(shared="mean"), WITHOUT_FIT])
def test_equal_neighbours_share_without_loss(config: ModelConfig, method: FitMethod) -> None:
    model = with_equal_neighbours(trained(config), shuffled=True)
    before = copy.deepcopy(model.state_dict())
    reduced = reduce_trained(model, example(GROUPED, config), method, images)
    assert_same_outputs(model, reduced)
    assert len({view.module for views in mlp_views(reduced) for view in views}) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "left as it is"


def test_the_units_of_the_mean_are_matched() -> None:
    model = with_equal_neighbours(trained(PLAIN), shuffled=True)
    (one,), (other,) = mlp_views(model)[:2]
    assert not torch.equal(one.unit_vectors(), other.unit_vectors())
    assert torch.equal(one.unit_vectors(), other.unit_vectors()[matching_units(one, other)])


def test_the_first_and_the_mean_of_a_group() -> None:
    model = trained(PLAIN)
    vectors = [views[0].unit_vectors() for views in mlp_views(model)]
    groups = {"strategy": "grouped", "groups": [[0, 3], [1, 2]]}
    first = reduce_trained(model, example(groups), FitMethod("first", refit=False), no_images)
    assert torch.equal(mlp_views(first)[3][0].unit_vectors(), vectors[0])
    mean = reduce_trained(model, example(groups), FitMethod("mean", refit=False), no_images)
    (one,), _, _, (other,) = mlp_views(model)
    matched = vectors[3][matching_units(one, other)]
    torch.testing.assert_close(mlp_views(mean)[3][0].unit_vectors(), (vectors[0] + matched) / 2)
    assert tied_names(mean) == tied_names(example(groups))


# --- narrowing --------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("units", ["weights", "activations"])
def test_units_without_effect_are_left_out(config: ModelConfig, units: Any) -> None:
    model = trained(config)
    with torch.no_grad():
        for (view,) in mlp_views(model):
            view.output.weight[:, torch.randperm(view.hidden)[: view.hidden // 2]] = 0
    reduced = reduce_trained(model, example(SHALLOW, config), FitMethod(units=units, refit=False), images)
    if not any(isinstance(module, nn.LayerNorm) for (view,) in mlp_views(model) for module in view.module.modules()):
        assert_same_outputs(model, reduced)  # a norm over the hidden units sees those without effect too
    for (view,) in mlp_views(reduced):
        assert bool((view.output.weight != 0).any(0).all())


def test_activations_choose_by_what_the_images_show() -> None:
    """Units of large weights that no image activates are left out, those of small weights and large biases stay."""
    model = trained(PLAIN)
    (view,) = mlp_views(model)[0]
    quiet = torch.arange(view.hidden) % 2 == 0
    with torch.no_grad():
        view.module.fc1.bias[quiet] = -100.0
        view.module.fc1.weight[~quiet] *= 0.01
        view.module.fc1.bias[~quiet] = 1.0
    settings = {"strategy": "shallow", "blocks": [0]}
    by_weights = reduce_trained(model, example(settings), FitMethod(units="weights", refit=False), no_images)
    by_activations = reduce_trained(model, example(settings), FitMethod(refit=False), images)
    biases = [mlp_views(reduced)[0][0].module.fc1.bias for reduced in (by_weights, by_activations)]
    assert torch.equal(biases[0], torch.full_like(biases[0], -100.0))
    assert torch.equal(biases[1], torch.full_like(biases[1], 1.0))
    assert_same_outputs(model, by_activations)


@pytest.mark.parametrize("reduction", [SHALLOW, {"strategy": "thin"}], ids=["shallow", "thin"])
def test_units_that_repeat_others_are_made_up_for_by_the_fit(reduction: dict[str, Any]) -> None:
    model = trained(PLAIN)
    with torch.no_grad():
        for (view,) in mlp_views(model):
            half = view.hidden // 2
            view.module.fc1.weight[half:] = view.module.fc1.weight[:half]
            view.module.fc1.bias[half:] = view.module.fc1.bias[:half]
    fitted = reduce_trained(model, example(reduction), FitMethod(units="first", ridge=1e-10), images)
    # fp32 activations go into the fit.
    assert_same_outputs(model, fitted, tolerance=1e-3)
    plain = reduce_trained(model, example(reduction), FitMethod(units="first", refit=False), no_images)
    with pytest.raises(AssertionError):
        assert_same_outputs(model, plain, tolerance=0.05)


# --- the fit ----------------------------------------------------------------------------------------------


def stored(model: nn.Module, block: int) -> tuple[Tensor, Tensor]:
    """All hidden activations and outputs of a block's MLP."""
    found: list[tuple[Tensor, Tensor]] = []
    for batch in images():
        watch_mlps(model, batch, lambda use: found.append((use.hidden, use.output)) if use.block == block else None)
    hidden, output = zip(*found, strict=True)
    return torch.cat(hidden), torch.cat(output)


def test_each_use_is_fitted_with_its_own_inputs_block_by_block() -> None:
    """Written out: the first use alone, then both with the inputs that the second has behind the fitted first."""
    model = trained(PLAIN)
    ridge = 1e-3
    groups = {"strategy": "grouped", "groups": [[1, 3]]}
    expected = reduce_trained(model, example(groups), FitMethod(refit=False), no_images)
    layer = mlp_views(expected)[1][0].output
    hidden, targets = [], []
    for block in (1, 3):
        hidden.append(stored(expected, block)[0])
        targets.append(stored(model, block)[1])
        weight, bias = refitted(layer, Moments.of(torch.cat(hidden), torch.cat(targets)), ridge)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    blocks: list[int] = []
    reduced = reduce_trained(model, example(groups), FitMethod(ridge=ridge), images, on_use=blocks.append)
    assert blocks == [1, 3]
    for name, tensor in canonical_state(expected).items():
        # Sums over batches round otherwise, in fp64.
        torch.testing.assert_close(canonical_state(reduced)[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", [GROUPED, {"strategy": "grouped", "keep": 0.5}, SHALLOW])
@torch.no_grad()
def test_the_fit_lowers_the_error_and_repeats_itself(reduction: dict[str, Any]) -> None:
    model = trained(PLAIN)
    plain = reduce_trained(model, example(reduction), WITHOUT_FIT, images)
    once, again = (reduce_trained(model, example(reduction), FitMethod(ridge=1e-3), images) for _ in range(2))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in once.state_dict().items())
    errors = [float(sum((each(batch) - model(batch)).square().sum() for batch in images())) for each in (once, plain)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("first", [GROUPED, SHALLOW, {"strategy": "thin"}], ids=lambda first: first["strategy"])
def test_a_reduced_model_is_reduced_along_the_other_axis(first: dict[str, Any]) -> None:
    model = trained(PLAIN, first)
    kwargs = {**KWARGS, "mlp_ratio": 2.0} if first["strategy"] == "thin" else KWARGS
    goal = {"strategy": "grouped", "keep": 1.0 if first["strategy"] == "thin" else 0.5}
    wanted = example(goal, PLAIN.model_copy(update={"kwargs": kwargs}))
    reduced = reduce_trained(model, wanted, FitMethod(), images)
    shapes = {name: tensor.shape for name, tensor in canonical_state(wanted).items()}
    assert {name: tensor.shape for name, tensor in canonical_state(reduced).items()} == shapes
    assert tied_names(reduced) == tied_names(wanted)


class _Alternate(Reduction):
    """Every second block has no MLP."""

    strategy: Literal["alternate"] = "alternate"

    def source(self, block: int, depth: int) -> int | None:
        return block if block % 2 == 0 else None


def test_any_reduction_is_taken_by_its_structure() -> None:
    model = trained(PLAIN)
    wanted = reduce_model(example({"strategy": "none"}), _Alternate())
    reduced = reduce_trained(model, wanted, FitMethod(), no_images)
    assert canonical_state(reduced).keys() == canonical_state(wanted).keys()
    with torch.no_grad():
        for (view,) in mlp_views(model)[1::2]:
            view.output.weight.zero_()
            view.output.bias.zero_()
    assert_same_outputs(model, reduced)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (SHALLOW, GROUPED, "an MLP of 32 hidden units cannot get 64"),
        (GROUPED, SHALLOW, "shares the MLP of block 1, the reduced one does not"),
        ({"strategy": "shallow", "blocks": [1]}, GROUPED, "blocks 0 and 1 cannot share an MLP: .* 64 and 32 hidden"),
    ],
)
def test_what_cannot_be_reached_is_one_line(before: dict[str, Any], after: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        reduce_trained(trained(PLAIN, before), example(after), FitMethod(), images)
    assert "\n" not in str(error.value)
