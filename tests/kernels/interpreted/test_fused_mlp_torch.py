"""fused_mlp inside torch's machinery: operator checks, compile, autocast, checkpointing, sharing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernel_cases import SAVES, Case, check_autocast, make_arguments, run
from kernel_training import agree, curves, differences
from scalevit.kernels import eager_mlp, fused_mlp

CASE = Case(rows=(9,), d=16, h=32, d_out=16)


@pytest.mark.parametrize("save", [*SAVES, "none"])
def test_opcheck(save):
    arguments = make_arguments(CASE)
    if save == "none":
        arguments = [t.detach() for t in arguments]
    torch.library.opcheck(torch.ops.scalevit.fused_mlp.default, (*arguments, 16, "gelu", save, False, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole(dtype):
    case = Case(rows=(9,), d=16, h=32, d_out=16, dtype=dtype)
    arguments = make_arguments(case)
    compiled = torch.compile(lambda *a, **k: fused_mlp(*a, **k) * 2, fullgraph=True)
    plain = run(lambda *a, **k: fused_mlp(*a, **k) * 2, arguments, case)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, arguments, case), plain, strict=True))


@pytest.mark.parametrize("save", SAVES)
def test_compiles_with_no_rows(save):
    case = Case(rows=(0,), d=16, h=32, d_out=16)
    arguments = make_arguments(case)
    compiled = torch.compile(lambda *a, **k: fused_mlp(*a, **k) * 2, fullgraph=True, backend="aot_eager")
    y, dx, *rest = run(compiled, arguments, case, save=save)
    assert (y.shape, dx.shape) == ((0, 16), (0, 16))
    assert [g.shape for g in rest] == [t.shape for t in arguments[1:]]
    assert not any(g.any() for g in rest)


def _dual(function, x, tangent):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(function(torch.autograd.forward_ad.make_dual(x, tangent))).tangent


@pytest.mark.parametrize(
    ("derive", "named"),
    [
        (lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1], "forward-mode"),
        (lambda f, x, t: torch.func.jacfwd(f)(x), "forward-mode"),
        (lambda f, x, t: torch.compile(lambda x, t: torch.func.jvp(f, (x,), (t,))[1], backend="aot_eager")(x, t),
         "forward-mode"),
        (_dual, "forward-mode"),
        (lambda f, x, t: torch.func.grad(lambda x: f(x).square().sum())(x), "torch.func"),
        (lambda f, x, t: torch.func.jacrev(f)(x), "torch.func"),
    ],
    ids=["jvp", "jacfwd", "compiled jvp", "dual tensors", "grad", "jacrev"],
)  # fmt: skip
def test_other_derivatives_are_never_silently_zero(derive, named):
    """The operator only has backward(): "auto" gives eager's derivative, "triton" an error that names the transform."""
    x, *weights = [t.detach() for t in make_arguments(CASE)]
    tangent = torch.ones_like(x)
    expected = derive(lambda x: eager_mlp(x, *weights), x, tangent)
    assert expected.any()
    torch.testing.assert_close(derive(lambda x: fused_mlp(x, *weights), x, tangent), expected)
    with pytest.raises(RuntimeError, match=named):
        derive(lambda x: fused_mlp(x, *weights, backend="triton"), x, tangent)


def test_vmap():
    x, *weights = [t.detach() for t in make_arguments(CASE)]
    mapped = torch.vmap(lambda x: fused_mlp(x, *weights, backend="triton"))(torch.stack([x, x + 1]))
    assert torch.equal(mapped, torch.stack([fused_mlp(x, *weights), fused_mlp(x + 1, *weights)]))


def test_compiles_whole_under_autocast():
    arguments = make_arguments(CASE)
    compiled = torch.compile(fused_mlp, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        plain, traced = run(fused_mlp, arguments, CASE), run(compiled, arguments, CASE)
    assert all(torch.equal(a, b) for a, b in zip(traced, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Forward in the autocast dtype; gradients in the parameters' own, as eager."""
    arguments = make_arguments(CASE)
    with torch.autocast("cpu", dtype):
        fused = run(fused_mlp, arguments, CASE)
        eager = run(eager_mlp, arguments, CASE)
    assert fused[0].dtype == dtype
    for f, e in zip(fused, eager, strict=True):
        assert f.dtype == e.dtype
        # Both carry a few roundings to `dtype`; four steps of the largest value bound their difference.
        torch.testing.assert_close(f, e, rtol=0, atol=4 * torch.finfo(dtype).eps * e.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("width", [None, 48])
def test_autocast_against_fp64(dtype, save, width):
    check_autocast(Case(rows=(70,), save=save, width=width), dtype)


@pytest.mark.parametrize("save", SAVES)
def test_activation_checkpointing(save):
    arguments = make_arguments(CASE)
    plain = run(fused_mlp, arguments, CASE, save=save)
    again = run(lambda *a, **k: checkpoint(fused_mlp, *a, use_reentrant=False, **k), arguments, CASE, save=save)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("rows", [(), (9,), (3, 3)])
def test_the_result_is_no_view(rows):
    """A residual added in place must reach the result's own gradient, hooks included."""
    arguments = make_arguments(Case(rows=rows, d=16, h=32, d_out=16))
    y = fused_mlp(*arguments)
    assert y._base is None
    hooked = []
    y.register_hook(lambda gradient: hooked.append(gradient.shape))
    y += 1
    y.sum().backward()
    assert hooked == [y.shape]


def test_inference_mode():
    arguments = make_arguments(CASE)
    expected = fused_mlp(*arguments)
    with torch.inference_mode():
        assert torch.equal(fused_mlp(*arguments), expected)


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_shared_weights_accumulate(uses):
    """The same weights used by several blocks: the gradient is the sum of the gradients of each use."""
    x, *weights = make_arguments(Case(rows=(9,), d=16, h=32, d_out=16, dtype=torch.float64))
    xs = [x.detach() + i for i in range(uses)]
    sum(fused_mlp(x, *weights).sum() for x in xs).backward()
    together = [w.grad for w in weights]
    alone = [torch.autograd.grad(fused_mlp(x, *weights).sum(), weights) for x in xs]
    for whole, *parts in zip(together, *alone, strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=0, atol=1e-12)


def test_shared_weights_in_sequence():
    """Three blocks in a row with one MLP: each use's gradient passes through those before it."""
    x, *weights = make_arguments(Case(rows=(9,), d=16, h=32, d_out=16, dtype=torch.float64))

    def blocks(mlp):
        y = x
        for _ in range(3):
            y = y + mlp(y, *weights)
        return torch.autograd.grad(y.square().sum(), [x, *weights])

    for fused, eager in zip(blocks(fused_mlp), blocks(eager_mlp), strict=True):
        # Sums of other orders, in fp64: a few hundred steps of the largest value.
        torch.testing.assert_close(fused, eager, rtol=0, atol=1e-13 * eager.abs().max().item())


def test_random_widths_train_one_set_of_weights():
    """A step at each of several widths: the tail's gradient is zero, and every width then computes what eager does."""
    x, *weights = make_arguments(Case(rows=(9,), d=16, h=64, d_out=16))
    mine, theirs = ([w.detach().clone().requires_grad_() for w in weights] for _ in range(2))
    optimizers = [torch.optim.SGD(p, lr=0.1, momentum=0.9) for p in (mine, theirs)]
    widths = [48, 16, 64, 32, 16, 64, 48]
    for width in widths:
        for mlp, parameters, optimizer in zip((fused_mlp, eager_mlp), (mine, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            mlp(x.detach(), *parameters, width=width).square().mean().backward()
            optimizer.step()
        w1, b1, w2, _ = (p.grad for p in mine)
        for used, tail in ((w1[:width], w1[width:]), (b1[:width], b1[width:]), (w2[:, :width], w2[:, width:])):
            assert used.any()
            assert not tail.any()
    for width in sorted(set(widths)):
        # Seven steps add a few fp32 roundings each, of values about 1.
        torch.testing.assert_close(
            fused_mlp(x, *mine, width=width), eager_mlp(x, *theirs, width=width), rtol=0, atol=1e-4
        )


def test_mixed_widths_share_one_set_of_weights():
    x, *weights = make_arguments(CASE)
    narrow, wide = (fused_mlp(x, *weights, width=w) for w in (16, 32))
    (narrow.sum() + wide.sum()).backward()
    reference = [w.detach().requires_grad_() for w in weights]
    (eager_mlp(x, *reference, width=16).sum() + eager_mlp(x, *reference).sum()).backward()
    for w, r in zip(weights, reference, strict=True):
        torch.testing.assert_close(w.grad, r.grad, rtol=1e-5, atol=1e-5)


def test_fp32_accumulation_where_an_engine_asks():
    """parameter.grad_dtype = fp32: the sum over uses keeps bits that bf16 sums lose."""
    case = Case(rows=(40,), dtype=torch.bfloat16)
    x, *weights = make_arguments(case)
    truth = [w.detach().double().requires_grad_() for w in weights]
    for index in (0, 2):
        weights[index] = weights[index].detach().requires_grad_()
        weights[index].grad_dtype = torch.float32
    for _ in range(3):
        fused_mlp(x, *weights).sum().backward()
        eager_mlp(x.detach().double(), *truth).sum().backward()
    for index in (0, 2):
        grad = weights[index].grad
        assert grad.dtype == torch.float32
        # The products' inputs are bf16 (a step is 2**-8); the sums add nothing, so errors average down.
        error, size = ((t.double()).pow(2).mean().sqrt() for t in (grad - truth[index].grad, truth[index].grad))
        assert error < 2**-8 * size
        assert not torch.equal(grad, grad.bfloat16().float())


def test_double_backward_is_refused():
    arguments = make_arguments(CASE)
    (gradient,) = torch.autograd.grad(fused_mlp(*arguments).sum(), arguments[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_training_run_follows_eager(dtype):
    """The device test's 500 steps, in small: autocast, shared modules, AdamW."""
    losses = curves("cpu", dtype, steps=6, d=32, h=64, batch=4)
    assert all(values.isfinite().all() for values in losses.values())
    assert agree(losses, dtype), differences(losses)


def test_a_run_that_departs_is_seen():
    """A departure of 1e-4 is a fault in fp32, where eager differs from itself by 1e-6, and within bf16's roundings."""
    eager = torch.linspace(2.3, 0.1, 100)
    losses = {"eager": eager, "reordered": eager + 1e-6, "fused": eager + 1e-4}
    assert not agree(losses, torch.float32)
    assert agree(losses, torch.bfloat16)
    assert not agree(losses | {"fused": eager + 2e-3}, torch.bfloat16)
