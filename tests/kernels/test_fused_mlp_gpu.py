"""The interpreter's cases on a real device, and what only a device shows: memory, graphs, a training run."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from kernel_cases import (
    CASES,
    SAVES,
    Case,
    check_against_fp64,
    check_autocast,
    kept_bytes,
    make_arguments,
    run,
    using_plan,
)
from kernel_training import agree, curves, differences
from scalevit.kernels import eager_mlp, fused_mlp
from scalevit.kernels.tuning import tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

BLOCK = Case(rows=(16, 197), d=768, h=3072, d_out=768, dtype=torch.bfloat16)
DEVICE_CASES = [
    Case(rows=(16, 197), d=768, h=3072, d_out=768, dtype=d, save=s, width=w)
    for d in (torch.bfloat16, torch.float16, torch.float32)
    for s in SAVES
    for w in (None, 1536, 784)
]


@pytest.mark.parametrize("case", [*CASES, *DEVICE_CASES], ids=str)
def test_error_below_twice_eager(case):
    check_against_fp64(case, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("save", SAVES)
def test_every_product_in_triton(dtype, save):
    """Also the products that the table leaves to the library."""
    tile = tables.UNALIGNED
    grads = tables.Tile(64, 64, 32, descriptors=False, splits=3)
    case = Case(rows=(4, 197), d=384, h=768, d_out=384, dtype=dtype, save=save, width=400)
    with using_plan(tables.KernelPlan(tile, tile, tile, tile, grads, grads)):
        check_against_fp64(case, "cuda")


@pytest.mark.parametrize("kind", tables.CANDIDATES)
def test_every_candidate_runs(kind):
    """Each tile that the tuner may choose on this device computes the right numbers."""
    table = tables.read_table(tables.table_path(tables.device_name(torch.device("cuda", 0))))
    products = {"wgrad": ("fc1_wgrad", "fc2_wgrad"), "fc2_dgrad_lean": ("fc2_dgrad",)}.get(kind, (kind,))
    saves = ("lean",) if kind == "fc2_dgrad_lean" else SAVES if kind == "fc1" else ("fast",)
    for tile in table.candidates[kind]:
        for save in saves:
            with using_plan(tables.KernelPlan(**dict.fromkeys(products, tile))):
                check_against_fp64(Case(rows=(700,), d=256, h=512, d_out=256, dtype=torch.bfloat16, save=save), "cuda")


@pytest.mark.parametrize("save", SAVES)
def test_repeats_bit_for_bit(save):
    arguments = make_arguments(BLOCK, "cuda")
    first = run(fused_mlp, arguments, BLOCK, save=save)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(fused_mlp, arguments, BLOCK, save=save), strict=True))


def test_compiles_whole():
    arguments = make_arguments(BLOCK, "cuda")
    compiled = torch.compile(lambda *a, **k: fused_mlp(*a, **k) * 2, fullgraph=True)
    plain = run(lambda *a, **k: fused_mlp(*a, **k) * 2, arguments, BLOCK)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, arguments, BLOCK), plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    case = Case(rows=(16, 197), d=768, h=3072, d_out=768)
    arguments = make_arguments(case, "cuda")
    with torch.autocast("cuda", dtype):
        fused, eager = run(fused_mlp, arguments, case), run(eager_mlp, arguments, case)
    for f, e in zip(fused, eager, strict=True):
        assert f.dtype == e.dtype
        # Both carry a few roundings to `dtype`; four steps of the largest value bound their difference.
        torch.testing.assert_close(f, e, rtol=0, atol=4 * torch.finfo(dtype).eps * e.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("width", [None, 1536, 784])
@pytest.mark.parametrize("plan", ["table", "library", "triton"])
def test_autocast_against_fp64(dtype, save, width, plan):
    """The weight gradients' products straight into a part of an fp32 gradient, by the library and by Triton."""
    case = Case(rows=(16, 197), d=768, h=3072, d_out=768, save=save, width=width)
    tile, grads = tables.UNALIGNED, tables.Tile(64, 64, 32, descriptors=False, splits=3)
    plans = {"library": tables.LIBRARY, "triton": tables.KernelPlan(tile, tile, tile, tile, grads, grads)}
    with using_plan(plans[plan]) if plan in plans else nullcontext():
        check_autocast(case, dtype, "cuda")


def test_captures_into_a_graph():
    x, *weights = [t.detach() for t in make_arguments(BLOCK, "cuda")]
    expected = fused_mlp(x, *weights, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused_mlp(x, *weights, backend="triton")
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("width", [None, 1536])
def test_fp32_accumulation_where_an_engine_asks(width):
    x, *weights = make_arguments(BLOCK, "cuda")
    for index in (0, 2):
        weights[index].grad_dtype = torch.float32
    fused_mlp(x, *weights, width=width, backend="triton").sum().backward()
    assert weights[0].grad.dtype == weights[2].grad.dtype == torch.float32
    assert not torch.equal(weights[0].grad, weights[0].grad.bfloat16().float())


def test_what_is_not_supported_runs_eagerly_with_one_warning(recwarn):
    arguments = make_arguments(Case(dtype=torch.float64), "cuda")
    for _ in range(2):
        assert torch.equal(fused_mlp(*arguments), eager_mlp(*arguments))
    assert [str(w.message) for w in recwarn.list if "fused_mlp" in str(w.message)] in (
        ["fused_mlp runs eagerly: torch.float64 has no kernel; fp32, bf16 and fp16 have"],
        [],  # an earlier test of this process had it
    )
    with pytest.raises(RuntimeError, match="float64 has no kernel"):
        fused_mlp(*arguments, backend="triton")


def test_lean_keeps_half_of_what_eager_keeps():
    arguments = make_arguments(BLOCK, "cuda")
    fused_mlp(*arguments)
    eager = kept_bytes(eager_mlp, arguments)
    assert kept_bytes(fused_mlp, arguments, save="lean") <= 0.55 * eager
    assert kept_bytes(fused_mlp, arguments, save="fast") <= 1.01 * eager
    assert kept_bytes(fused_mlp, arguments, save="recompute") <= 0.01 * eager


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_500_steps_train_alike(dtype):
    losses = curves("cuda", dtype, steps=500)
    first, *_, last = losses["eager"]
    assert last < 0.5 * first, "the task must be learned, or agreement means nothing"
    assert agree(losses, dtype), differences(losses)
