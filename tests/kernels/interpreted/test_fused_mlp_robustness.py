"""What fused_mlp must do besides being right: repeat its bits, read only what it may, give what is asked."""

import itertools
from dataclasses import replace

import pytest
import torch

from kernel_cases import SAVES, Case, check_against_fp64, make_arguments, run, using_plan
from kernel_launches import Launches
from scalevit.kernels import fused_mlp, gelu_linear, weight_grad
from scalevit.kernels.tuning import tables


@pytest.mark.parametrize("save", SAVES)
def test_repeats_bit_for_bit(save):
    case = Case(rows=(70,), dtype=torch.bfloat16, save=save)
    first, second = (run(fused_mlp, make_arguments(case), case, save=save) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_fast_and_recompute_agree_bit_for_bit():
    case = Case(dtype=torch.bfloat16)
    fast, again = (run(fused_mlp, make_arguments(case), case, save=s) for s in ("fast", "recompute"))
    assert all(torch.equal(a, b) for a, b in zip(fast, again, strict=True))


def test_gradient_of_a_sum_has_no_strides():
    """sum().backward() hands the op an expanded scalar: all strides zero."""
    case = Case(rows=(5, 7))
    check_against_fp64(case, dy=torch.ones((), dtype=torch.float64).expand(5, 7, case.d_out))


NEEDS = [n for n in itertools.product((False, True), repeat=5) if sum(n) in (1, 2)]


# Each by itself with every save mode, pairs with the one that computes the most in its backward.
@pytest.mark.parametrize(("needs", "save"), [(n, s) for n in NEEDS for s in SAVES if sum(n) == 1 or s == "lean"])
def test_subsets_of_gradients(needs, save):
    case = Case(rows=(9,), d=16, h=32, d_out=16)
    whole = run(fused_mlp, make_arguments(case), case, save=save)[1:]
    arguments = [t.detach().requires_grad_(n) for t, n in zip(make_arguments(case), needs, strict=True)]
    y = fused_mlp(*arguments, save=save)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    y.backward(dy)
    for t, n, expected in zip(arguments, needs, whole, strict=True):
        assert (t.grad is not None) == n
        assert not n or torch.equal(t.grad, expected)


@pytest.mark.parametrize("plan", [tables.INTERPRETER, tables.LIBRARY], ids=["triton", "library"])
@pytest.mark.parametrize("save", SAVES)
def test_no_rows(save, plan):
    """An empty batch gives an empty result, and gradients of zero."""
    case = Case(rows=(0, 5))
    with using_plan(plan):
        y, dx, *rest = run(fused_mlp, make_arguments(case), case, save=save)
    assert y.shape == (0, 5, case.d_out)
    assert dx.shape == (0, 5, case.d)
    assert not any(g.any() for g in rest)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("case", [Case(), Case(d=45, h=75, d_out=33)], ids=str)
def test_reads_nothing_uninitialised(case, save):
    """Every buffer the op allocates starts as NaN here; one unwritten element that is read would show."""
    expected = run(fused_mlp, make_arguments(case), case, save=save)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        assert torch.empty(3).isnan().all()
        poisoned = run(fused_mlp, make_arguments(case), case, save=save)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, poisoned, strict=True))


@pytest.mark.parametrize("save", SAVES)
def test_never_reads_weights_beyond_the_width(save):
    case = Case(width=48, save=save)
    clean = make_arguments(case)
    dirty = [t.detach().clone() for t in clean]
    for tail in (dirty[1][48:], dirty[2][48:], dirty[3][:, 48:]):
        tail.fill_(float("nan"))
    dirty = [t.requires_grad_() for t in dirty]
    expected = run(fused_mlp, clean, case, save=save)
    assert all(torch.equal(a, b) for a, b in zip(expected, run(fused_mlp, dirty, case, save=save), strict=True))


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("save", SAVES)
def test_narrowed_weights_are_never_copied(save, descriptors, monkeypatch):
    """The kernels read the parameters and write their whole gradients in place, at the full width's strides."""
    tile = tables.Tile(32, 32, 32, descriptors=descriptors)
    case = Case(rows=(40,), width=48, save=save)
    forward, backward, grads = set(), set(), set()
    for module, name, seen in (
        (gelu_linear, "linear_gelu_kernel", forward), (gelu_linear, "linear_dgelu_kernel", backward),
        (weight_grad, "weight_grad_kernel", grads),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Launches(getattr(module, name), seen))
    arguments = make_arguments(case)
    _, w1, b1, w2, b2 = arguments
    with using_plan(tables.KernelPlan(*[tile] * 6)):
        _, _, dw1, _, dw2, _ = run(fused_mlp, arguments, case, save=save)
    d, h, d_out, width = case.d, case.h, case.d_out, case.width
    weights = {(w1.data_ptr(), (width, d), (d, 1)), (w2.data_ptr(), (d_out, width), (h, 1))}
    assert forward >= weights | {(b1.data_ptr(), (width,), (1,)), (b2.data_ptr(), (d_out,), (1,))}
    assert backward >= weights
    assert grads >= {(dw1.data_ptr(), (width, d), (d, 1)), (dw2.data_ptr(), (d_out, width), (h, 1))}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gradcheck_in_fp64(save, activation):
    case = Case(rows=(3,), d=5, h=16, d_out=4, dtype=torch.float64)
    arguments = make_arguments(case)
    assert torch.autograd.gradcheck(
        lambda *a: fused_mlp(*a, activation=activation, save=save), arguments, fast_mode=True
    )


@pytest.mark.parametrize("plan", [tables.INTERPRETER, tables.LIBRARY], ids=["triton", "library"])
def test_biases_of_any_strides(plan):
    case = Case(width=48)
    plain = make_arguments(case)
    spread = [t.detach() for t in plain]
    for i in (2, 4):
        spread[i] = torch.stack([spread[i], torch.full_like(spread[i], float("nan"))], 1)[:, 0]
        assert spread[i].stride() == (2,)
    spread = [t.requires_grad_() for t in spread]
    with using_plan(plan):
        pairs = zip(run(fused_mlp, plain, case), run(fused_mlp, spread, case), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_what_is_not_aligned_runs_the_pointer_tile():
    """The compile report checks other tiles only for aligned tensors, so no others may reach them."""
    tile, other = tables.Tile(32, 32, 32), tables.Tile(64, 32, 32)
    x = torch.zeros(8, 64)
    assert gelu_linear.aligned_tile(tile, other, x, x[:, :48], x[2:], x[0], None) == tile
    assert gelu_linear.aligned_tile(tile, other, x.bfloat16()[:, 16:]) == tile
    for bad in (x[:, :40], x[:, 1:49], x[0, 1:], x.T, x[:, ::2], x[:1].expand(8, 64), torch.zeros(8, 72)[:, :64]):
        assert gelu_linear.aligned_tile(tile, other, x, bad) == other
        assert gelu_linear.aligned_tile(replace(tile, descriptors=False), other, bad) == other


@pytest.mark.parametrize("save", SAVES)
def test_weights_of_any_strides(save):
    """A transposed weight has no descriptor; it is read where it lies, like every other."""
    case = Case(save=save, width=48)
    plain = make_arguments(case)
    turned = [t.detach() for t in plain]
    for i in (1, 3):
        turned[i] = turned[i].T.contiguous().T
    turned = [t.requires_grad_() for t in turned]
    assert not turned[1].is_contiguous()
    for a, b in zip(run(fused_mlp, plain, case, save=save), run(fused_mlp, turned, case, save=save), strict=True):
        # The pointer tile sums in blocks of another size: a few fp32 steps of the largest value.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, a.abs().max().item()))
