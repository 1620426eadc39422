"""fused_gated_mlp inside torch's machinery: operator checks, compile, autocast, checkpointing, sharing."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gated_cases import GatedCase
from kernel_cases import SAVES, check_autocast, run
from scalevit.kernels import eager_gated_mlp, eager_packed_gated_mlp, fused_gated_mlp, fused_mlp, fused_packed_gated_mlp

CASE = GatedCase(rows=(9,), d=16, h=32, d_out=16)
PACKED = replace(CASE, form="gate_first")
BOTH = pytest.mark.parametrize("case", [CASE, PACKED], ids=str)


@pytest.mark.parametrize(
    ("case", "save"), [(CASE, "fast"), (PACKED, "lean"), (PACKED, "recompute"), (CASE, "none")], ids=str
)
def test_opcheck(case, save):
    x, *parameters = [t.detach().requires_grad_(save != "none") for t in case.arguments()]
    *layers, w2, b2 = parameters
    layers += [None] * (4 - len(layers))
    options = (16, "silu", save, False, [False, False, False])
    torch.library.opcheck(torch.ops.scalevit.fused_gated_mlp.default, (x, *layers, w2, b2, *options))


@pytest.mark.parametrize("case", [CASE, replace(PACKED, dtype=torch.bfloat16, width=16)], ids=str)
def test_compiles_whole(case):
    compiled = torch.compile(lambda *a, **k: case.fused(*a, **k) * 2, fullgraph=True, backend="aot_eager")
    plain = run(lambda *a, **k: case.fused(*a, **k) * 2, case.arguments(), case)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, case.arguments(), case), plain, strict=True))


def test_compiles_whole_under_autocast():
    compiled = torch.compile(PACKED.fused, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        plain, traced = (run(f, PACKED.arguments(), PACKED) for f in (PACKED.fused, compiled))
    assert all(torch.equal(a, b) for a, b in zip(traced, plain, strict=True))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (GatedCase(save="fast"), torch.bfloat16), (GatedCase(save="lean", width=32), torch.float16),
        (GatedCase(save="recompute", form="gate_first"), torch.float16),
        (GatedCase(save="fast", form="gate_last", width=16), torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_autocast_against_fp64(case, dtype):
    check_autocast(case, dtype)


@BOTH
def test_activation_checkpointing(case):
    plain = run(case.fused, case.arguments(), case)
    again = run(lambda *a, **k: checkpoint(case.fused, *a, use_reentrant=False, **k), case.arguments(), case)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@BOTH
def test_other_derivatives_are_never_silently_zero(case):
    x, *parameters = [t.detach() for t in case.arguments()]
    expected = torch.func.grad(lambda x: case.eager(x, *parameters).square().sum())(x)
    assert expected.any()
    assert torch.equal(torch.func.grad(lambda x: case.fused(x, *parameters).square().sum())(x), expected)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: case.fused(x, *parameters, backend="triton"), (x,), (x,))


@pytest.mark.parametrize("save", SAVES)
def test_vmap_with_frozen_weights_has_a_backward(save):
    """Inside vmap x does not say that the x outside requires a gradient."""
    x, *parameters = [t.detach() for t in PACKED.arguments()]
    x = torch.stack([x, x + 1]).requires_grad_()
    mapped = torch.vmap(lambda x: PACKED.fused(x, *parameters, save=save, backend="triton"))(x)
    whole = PACKED.fused(x, *parameters, save=save)
    assert torch.equal(mapped, whole)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (mapped, whole)))


def test_vmap_of_the_plain_operator_has_a_backward():
    x, w1, w2 = torch.randn(2, 9, 16, requires_grad=True), torch.randn(32, 16), torch.randn(16, 32)
    mapped = torch.vmap(lambda x: fused_mlp(x, w1, None, w2, None, backend="triton"))(x)
    whole = fused_mlp(x, w1, None, w2, None)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (mapped, whole)))


@BOTH
def test_the_result_is_no_view(case):
    y = case.fused(*replace(case, rows=(3, 3)).arguments())
    assert y._base is None


def test_inference_mode():
    expected = PACKED.fused(*PACKED.arguments())
    with torch.inference_mode():
        assert torch.equal(PACKED.fused(*PACKED.arguments()), expected)


@BOTH
def test_shared_weights_in_sequence(case):
    """Three blocks in a row with one MLP, at two widths: each use's gradient passes through those before it."""
    case = replace(case, dtype=torch.float64)
    x, *parameters = case.arguments()

    def blocks(mlp):
        y = x
        for width in (32, 16, 32):
            y = y + mlp(y, *parameters, width=width)
        return torch.autograd.grad(y.square().sum(), [x, *parameters])

    for fused, eager in zip(blocks(case.fused), blocks(case.eager), strict=True):
        # Sums of other orders, in fp64: a few hundred steps of the largest value.
        torch.testing.assert_close(fused, eager, rtol=0, atol=1e-13 * eager.abs().max().item())


@BOTH
def test_fp32_accumulation_where_an_engine_asks(case):
    """parameter.grad_dtype = fp32: the sum over uses keeps bits that bf16 sums lose."""
    x, *parameters = replace(case, rows=(40,), dtype=torch.bfloat16).arguments()
    truth = [p.detach().double().requires_grad_() for p in parameters]
    weights = [i for i, p in enumerate(parameters) if p.dim() == 2]
    for index in weights:
        parameters[index] = parameters[index].detach().requires_grad_()
        parameters[index].grad_dtype = torch.float32
    for _ in range(3):
        case.fused(x, *parameters, width=16).sum().backward()
        case.eager(x.detach().double(), *truth, width=16).sum().backward()
    for index in weights:
        grad = parameters[index].grad
        assert grad.dtype == torch.float32
        # The products' inputs are bf16 (a step is 2**-8); the sums add nothing, so errors average down.
        error, size = (t.double().square().mean().sqrt() for t in (grad - truth[index].grad, truth[index].grad))
        assert error < 2**-8 * size
        assert not torch.equal(grad, grad.bfloat16().float())


def test_double_backward_is_refused():
    arguments = CASE.arguments()
    (gradient,) = torch.autograd.grad(fused_gated_mlp(*arguments).sum(), arguments[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="fused_gated_mlp has no double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("fused", "eager", "case"),
    [(fused_gated_mlp, eager_gated_mlp, CASE), (fused_packed_gated_mlp, eager_packed_gated_mlp, PACKED)],
)
def test_a_short_training_run_follows_eager(fused, eager, case):
    """Steps at several widths: the tail's gradient is zero, and every width then computes what eager does."""
    x, *parameters = case.arguments()
    mine, theirs = ([p.detach().clone().requires_grad_() for p in parameters] for _ in range(2))
    optimizers = [torch.optim.SGD(p, lr=0.1, momentum=0.9) for p in (mine, theirs)]
    for width in (16, 32, 16, 32):
        for mlp, weights, optimizer in zip((fused, eager), (mine, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            mlp(x.detach(), *weights, width=width).square().mean().backward()
            optimizer.step()
        if width == 16:
            assert not any(tail.any() for tail in replace(case, width=16).tails([p.grad for p in mine]))
    for width in (16, 32):
        # Four steps add a few fp32 roundings each, of values about 1.
        torch.testing.assert_close(fused(x, *mine, width=width), eager(x, *theirs, width=width), rtol=0, atol=1e-4)
