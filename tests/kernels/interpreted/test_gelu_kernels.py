"""GELU itself: every finite bf16 value, the tails, and every mixture of products and tiles."""

import pytest
import torch

from kernel_cases import SAVES, Case, check_against_fp64, make_arguments, run, using_plan
from scalevit.kernels import fused_mlp, gelu
from scalevit.kernels.tuning import tables


def every_finite_bf16() -> torch.Tensor:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return values[values.isfinite()]


def reference(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu and gelu' in fp64; the erf form through log_ndtr, which keeps digits in the left tail."""
    x = x.double().requires_grad_()
    if activation == "gelu":
        y = x * torch.special.log_ndtr(x).exp()
    else:
        y = torch.nn.functional.gelu(x, approximate="tanh")
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_every_finite_bf16_value(activation):
    x = every_finite_bf16()
    y, slope = gelu.gelu_forward(x.clone(), activation=activation, save="slope")
    true_y, true_slope = reference(x, activation)
    # Far out the fp64 derivatives themselves are 0 * inf; they are a step there.
    far = x.double().abs() > 40
    true_slope = torch.where(far, (x.double() > 0).double(), true_slope)
    true_y = torch.where(far, x.double().clamp(min=0), true_y)
    assert not torch.isnan(y).any()
    assert not torch.isnan(slope).any()
    for mine, truth, error in ((y, true_y, 8.4e-7), (slope, true_slope, 1.2e-6)):
        # Half a bf16 step for the rounding, and the polynomial's absolute error before it (doubled: fp32
        # sums).
        limit = truth.abs() * 2**-8 + 2 * error
        assert ((mine.double() - truth).abs() <= limit).all()
    if activation == "gelu":
        # How often the fast form rounds otherwise than the exact one, subnormal results apart: 0.55 % when
        # fitted.
        differs = (y != true_y.bfloat16()) & (true_y.abs() >= 2**-126)
        assert differs.double().mean() < 0.006


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_fp32_keeps_its_digits(activation):
    x = torch.linspace(-12, 12, 20001)
    y, slope = gelu.gelu_forward(x.clone(), activation=activation, save="slope")
    true_y, true_slope = reference(x, activation)
    # A few fp32 steps of the largest term, as torch's own.
    assert (y - true_y).abs().max() < 2e-6
    assert (slope - true_slope).abs().max() < 2e-6


def test_nan_stays_nan():
    for activation in ("gelu", "gelu_tanh"):
        x = torch.tensor([float("nan"), 1.0], dtype=torch.bfloat16)
        y, _ = gelu.gelu_forward(x, activation=activation, save="none")
        assert y.isnan().tolist() == [True, False]


LIBRARY_CASES = [
    Case(dtype=d, save=s, width=w)
    for d in (torch.float32, torch.bfloat16, torch.float16)
    for s in SAVES
    for w in (None, 48)
]


@pytest.mark.parametrize("case", [*LIBRARY_CASES, Case(d=45, h=75, d_out=33)], ids=str)
def test_library_products_with_pointwise_gelu(case):
    """The plan that leaves every product to torch; fp32 runs it on every device."""
    with using_plan(tables.LIBRARY):
        check_against_fp64(case)


@pytest.mark.parametrize("product", tables.PRODUCTS)
def test_each_product_alone(product):
    """One product in Triton, the others the library's: every mixture of plans meets in these interfaces."""
    plan = tables.KernelPlan(**{product: getattr(tables.INTERPRETER, product)})
    for save in SAVES:
        with using_plan(plan):
            check_against_fp64(Case(dtype=torch.bfloat16, save=save, width=48))


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("descriptors", [True, False])
def test_every_epilogue(parts, descriptors):
    tile = tables.Tile(32, 64, 32, parts=parts, group_m=3, descriptors=descriptors)
    with using_plan(tables.KernelPlan(fc1=tile, fc2_dgrad=tile)):
        for save in SAVES:
            check_against_fp64(Case(rows=(70,), save=save))


@pytest.mark.parametrize("splits", [1, 2, 5, 16])
def test_weight_gradients_in_splits(splits):
    """More splits than blocks of tokens leave some empty; their sums are zero."""
    tile = tables.Tile(32, 32, 16, splits=splits)
    case = Case(rows=(70,), dtype=torch.bfloat16, width=48)
    with using_plan(tables.KernelPlan(fc1_wgrad=tile, fc2_wgrad=tile)):
        first = check_against_fp64(case)
        again = run(fused_mlp, make_arguments(case), case)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
