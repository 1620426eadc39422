"""fused_gated_mlp against fp64, by the criterion of `kernel_cases`, and what else it must do besides being right."""

from dataclasses import replace

import pytest
import torch

from gated_cases import FORMS, GATED_CASES, MIXED, GatedCase
from kernel_cases import SAVES, check_against_fp64, gradient_of, run, using_plan
from kernel_launches import Launches
from scalevit.kernels import gated_linear, weight_grad
from scalevit.kernels.tuning import tables

SMALL = GatedCase(rows=(9,), d=16, h=32, d_out=16)
PLANS = pytest.mark.parametrize("plan", [tables.INTERPRETER, tables.LIBRARY], ids=["triton", "library"])


@pytest.mark.parametrize("case", GATED_CASES, ids=str)
def test_error_below_twice_eager(case):
    fused = check_against_fp64(case)
    if case.width:
        assert not any(tail.any() for tail in case.tails(fused[2:]))


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_library_products_with_a_pointwise_gate(case):
    """The plan that leaves every product to torch; fp32 runs it on every device. Full width and a part of it."""
    with using_plan(tables.LIBRARY):
        check_against_fp64(case)
        check_against_fp64(replace(case, width=32))


@pytest.mark.parametrize("product", tables.PRODUCTS)
def test_each_product_alone(product):
    """One product in Triton, the others the library's: every mixture of plans meets in these interfaces."""
    plan = tables.KernelPlan(**{product: getattr(tables.INTERPRETER, product)})
    with using_plan(plan):
        for save, form in zip(SAVES, FORMS, strict=True):
            check_against_fp64(replace(SMALL, dtype=torch.bfloat16, save=save, form=form))


@pytest.mark.parametrize(
    ("parts", "descriptors", "save"), [(1, True, "lean"), (2, False, "lean"), (4, True, "fast"), (4, False, "lean")]
)
def test_every_epilogue(parts, descriptors, save):
    tile = tables.Tile(32, 64, 32, parts=parts, group_m=3, descriptors=descriptors)
    with using_plan(tables.KernelPlan(fc1=tile, fc2_dgrad=tile, fc1_dgrad=tile)):
        # 80 units: the second tile of the first half reaches beyond it, where the other half begins.
        check_against_fp64(GatedCase(rows=(70,), h=80, save=save, form="gate_first"))


def test_a_shipped_tables_own_tiles():
    table = tables.read_table(tables.table_path("sm_90", gated=True))
    with using_plan(table.default["lean"]):
        check_against_fp64(GatedCase(rows=(150,), d=80, h=96, d_out=80, dtype=torch.bfloat16, save="lean"))


def test_repeats_bit_for_bit():
    case = replace(SMALL, rows=(40,), dtype=torch.bfloat16)
    first, second = (run(case.fused, case.arguments(), case, save="lean") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@PLANS
def test_fast_and_recompute_agree_bit_for_bit(plan):
    case = replace(SMALL, dtype=torch.bfloat16, form="gate_last")
    with using_plan(plan):
        fast, again = (run(case.fused, case.arguments(), case, save=s) for s in ("fast", "recompute"))
    assert all(torch.equal(a, b) for a, b in zip(fast, again, strict=True))


@pytest.mark.parametrize("width", [None, 16])
def test_packed_and_separate_weights_agree_bit_for_bit(width):
    """Every product in Triton computes the same; only where the results lie differs."""
    case = replace(SMALL, form="gate_last", width=width, dtype=torch.bfloat16)
    x, w1, b1, w2, b2 = case.arguments()
    y, dx, dw1, db1, *rest = run(case.fused, [x, w1, b1, w2, b2], case)
    (value_w, gate_w), (value_b, gate_b) = (t.detach().chunk(2) for t in (w1, b1))
    separate = replace(case, form="separate")
    layers = [t.requires_grad_() for t in (gate_w, gate_b, value_w, value_b)]
    expected = [y, dx, *(t for i in (1, 0) for t in (dw1.chunk(2)[i], db1.chunk(2)[i])), *rest]
    results = run(separate.fused, [x, *layers, w2, b2], separate)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@PLANS
@pytest.mark.parametrize(("form", "save"), [("separate", "fast"), ("gate_first", "lean")])
def test_each_gradient_by_itself(form, save, plan):
    case = replace(SMALL, form=form)
    with using_plan(plan):
        whole = run(case.fused, case.arguments(), case, save=save)[1:]
        for wanted in range(len(whole)):
            arguments = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(case.arguments())]
            y = case.fused(*arguments, save=save)
            y.backward(gradient_of(y).float())
            for i, (t, expected) in enumerate(zip(arguments, whole, strict=True)):
                assert (t.grad is not None) == (i == wanted)
                assert i != wanted or torch.equal(t.grad, expected)


@PLANS
@pytest.mark.parametrize("save", SAVES)
def test_no_rows(save, plan):
    """An empty batch gives an empty result, and gradients of zero."""
    case = replace(SMALL, rows=(0, 5), form="gate_first")
    with using_plan(plan):
        y, dx, *rest = run(case.fused, case.arguments(), case, save=save)
    assert y.shape == (0, 5, case.d_out)
    assert dx.shape == (0, 5, case.d)
    assert not any(g.any() for g in rest)


@PLANS
@pytest.mark.parametrize(
    "case",
    [replace(SMALL, d=19, h=21, d_out=17, save="lean"), replace(SMALL, form="gate_last", width=16)],
    ids=str,
)
def test_reads_nothing_uninitialised(case, plan):
    """Every buffer the op allocates starts as NaN here, and what lies beyond the width is NaN."""
    clean = case.arguments()
    dirty = [t.detach().clone() for t in clean]
    for tail in case.tails(dirty[1:]) if case.width else ():
        tail.fill_(float("nan"))
    with using_plan(plan):
        expected = run(case.fused, clean, case, save=case.save)
        torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
        try:
            poisoned = run(case.fused, [t.requires_grad_() for t in dirty], case, save=case.save)
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, poisoned, strict=True))


@pytest.mark.parametrize("descriptors", [True, False])
def test_packed_weights_are_never_copied(descriptors, monkeypatch):
    """The kernels read halves of the parameter and fill halves of its one gradient, in place."""
    tile = tables.Tile(32, 32, 32, descriptors=descriptors)
    case = GatedCase(rows=(40,), d=32, h=64, d_out=32, width=48, form="gate_last")
    forward, backward, dx, grads = set(), set(), set(), set()
    for module, name, seen in (
        (gated_linear, "linear_gate_kernel", forward), (gated_linear, "linear_dgate_kernel", backward),
        (gated_linear, "sum_of_products_kernel", dx), (weight_grad, "weight_grad_kernel", grads),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Launches(getattr(module, name), seen))
    arguments = case.arguments()
    _, w1, b1, w2, _ = arguments
    with using_plan(tables.KernelPlan(*[tile] * 6)):
        _, _, dw1, _, dw2, _ = run(case.fused, arguments, case, save="lean")
    halves = {(t.data_ptr(), (48, 32), (32, 1)) for t in w1.chunk(2)}
    assert forward >= halves | {(t.data_ptr(), (48,), (1,)) for t in b1.chunk(2)}
    assert backward >= {(w2.data_ptr(), (32, 48), (64, 1))}
    assert dx >= halves
    assert grads >= {(t.data_ptr(), (48, 32), (32, 1)) for t in dw1.chunk(2)}
    assert grads >= {(dw2.data_ptr(), (32, 48), (64, 1))}


def test_the_library_sees_a_packed_weight_whole(monkeypatch):
    """One product for gate and value, one for dx, and one for both weight gradients."""
    case = replace(SMALL, form="gate_first")
    shapes = []
    products = {name: getattr(torch, name) for name in ("mm", "addmm")}
    for name, function in products.items():
        monkeypatch.setattr(
            torch, name, lambda *a, f=function, **k: shapes.append([tuple(t.shape) for t in a]) or f(*a, **k)
        )
    with using_plan(tables.LIBRARY):
        run(case.fused, case.arguments(), case)
    assert shapes == [[(64, 9), (9, 16)], [(16, 9), (9, 32)]], "the weight gradients; F.linear computes the others"


@pytest.mark.parametrize(("activation", "save"), [("silu", "fast"), ("silu", "lean"), ("gelu", "lean")])
def test_gradcheck_in_fp64(activation, save):
    case = GatedCase(rows=(2,), d=3, h=16, d_out=2, dtype=torch.float64, form="gate_last", activation=activation)
    with using_plan(tables.LIBRARY):
        assert torch.autograd.gradcheck(
            lambda *a: case.fused(*a, **case.options, save=save), case.arguments(), fast_mode=True
        )


@PLANS
def test_parameters_of_any_strides(plan):
    """Transposed weights and spread biases are read where they lie."""
    case = replace(SMALL, width=16)
    plain = case.arguments()
    turned = [t.detach() for t in plain]
    for i in (1, 3, 5):
        turned[i] = turned[i].T.contiguous().T
    for i in (2, 4, 6):
        turned[i] = torch.stack([turned[i], torch.full_like(turned[i], float("nan"))], 1)[:, 0]
    turned = [t.requires_grad_() for t in turned]
    with using_plan(plan):
        for a, b in zip(run(case.fused, plain, case), run(case.fused, turned, case), strict=True):
            # The pointer tile sums in blocks of another size: a few fp32 steps of the largest value.
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, a.abs().max().item()))


def test_nan_stays_nan():
    case = replace(SMALL, biases=(False, False, False))
    x, *rest = case.arguments()
    x = x.detach().clone()
    x[3, 2] = float("nan")
    y = case.fused(x, *rest)
    assert y.isnan().all(1).tolist() == [i == 3 for i in range(9)]
