"""The interpreter's cases of gated MLPs on a real device, and what only a device shows."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from gated_cases import FORMS, GATED_CASES, GatedCase
from kernel_cases import DTYPES, SAVES, check_against_fp64, check_autocast, kept_bytes, run, using_plan
from scalevit.kernels.tuning import tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

BLOCK = GatedCase(rows=(16, 197), d=768, h=2048, d_out=768, dtype=torch.bfloat16, form="gate_first")
DEVICE_CASES = [
    replace(BLOCK, dtype=dtype, save=save, form=form, width=width)
    for dtype in DTYPES
    for save, form in zip(SAVES, FORMS, strict=True)
    for width in (None, 1024, 784)
]
TRITON = tables.KernelPlan(*[tables.UNALIGNED] * 4, *[tables.Tile(64, 64, 32, descriptors=False, splits=3)] * 2)
BOTH = pytest.mark.parametrize("form", ["separate", "gate_first"])


@pytest.mark.parametrize("case", [*GATED_CASES, *DEVICE_CASES], ids=str)
def test_error_below_twice_eager(case):
    check_against_fp64(case, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("save", "form"), zip(SAVES, FORMS, strict=True))
def test_every_product_in_triton(dtype, save, form):
    """Also the products that the table leaves to the library."""
    case = GatedCase(rows=(4, 197), d=384, h=768, d_out=384, dtype=dtype, save=save, form=form, width=400)
    with using_plan(TRITON):
        check_against_fp64(case, "cuda")


@pytest.mark.parametrize("kind", tables.CANDIDATES)
def test_every_candidate_runs(kind):
    """Each tile that the tuner may choose on this device computes the right numbers, in more tiles than programs."""
    name = tables.device_name(torch.device("cuda", 0))
    table = tables.read_table(tables.table_path(name, gated=True))
    products = {"wgrad": ("fc1_wgrad", "fc2_wgrad"), "fc2_dgrad_lean": ("fc2_dgrad",)}.get(kind, (kind,))
    saves = ("lean",) if kind == "fc2_dgrad_lean" else SAVES if kind == "fc1" else ("fast",)
    for tile in table.candidates[kind]:
        for save in saves:
            with using_plan(tables.KernelPlan(**dict.fromkeys(products, tile))):
                case = GatedCase(rows=(9000,), d=256, h=528, d_out=256, dtype=torch.bfloat16, save=save)
                check_against_fp64(case, "cuda")


@pytest.mark.parametrize("save", SAVES)
def test_repeats_bit_for_bit(save):
    arguments = BLOCK.arguments("cuda")
    first = run(BLOCK.fused, arguments, BLOCK, save=save)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(BLOCK.fused, arguments, BLOCK, save=save), strict=True))


@BOTH
def test_compiles_whole(form):
    case = replace(BLOCK, form=form)
    arguments = case.arguments("cuda")
    compiled = torch.compile(lambda *a, **k: case.fused(*a, **k) * 2, fullgraph=True)
    plain = run(lambda *a, **k: case.fused(*a, **k) * 2, arguments, case)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, arguments, case), plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("save", "form"), zip(SAVES, FORMS, strict=True))
@pytest.mark.parametrize("width", [None, 784])
@pytest.mark.parametrize("plan", ["table", "library", "triton"])
def test_autocast_against_fp64(dtype, save, form, width, plan):
    """The weight gradients' products straight into halves of an fp32 gradient, by the library and by Triton."""
    case = replace(BLOCK, dtype=torch.float32, save=save, form=form, width=width)
    plans = {"library": tables.LIBRARY, "triton": TRITON}
    with using_plan(plans[plan]) if plan in plans else nullcontext():
        check_autocast(case, dtype, "cuda")


def test_captures_into_a_graph():
    x, *parameters = [t.detach() for t in BLOCK.arguments("cuda")]
    expected = BLOCK.fused(x, *parameters, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = BLOCK.fused(x, *parameters, backend="triton")
    graph.replay()
    assert torch.equal(y, expected)


@BOTH
@pytest.mark.parametrize("width", [None, 784])
def test_fp32_accumulation_where_an_engine_asks(form, width):
    case = replace(BLOCK, form=form)
    x, *parameters = case.arguments("cuda")
    weights = [p for p in parameters if p.dim() == 2]
    for weight in weights:
        weight.grad_dtype = torch.float32
    case.fused(x, *parameters, width=width, backend="triton").sum().backward()
    for weight in weights:
        assert weight.grad.dtype == torch.float32
        assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


@BOTH
def test_keeps_what_the_save_mode_says(form):
    """Of the four hidden tensors that eager keeps: three, two or none."""
    case = replace(BLOCK, form=form)
    arguments = case.arguments("cuda")
    case.fused(*arguments)
    eager = kept_bytes(case.eager, arguments)
    assert kept_bytes(case.fused, arguments, save="fast") <= 0.76 * eager
    assert kept_bytes(case.fused, arguments, save="lean") <= 0.51 * eager
    assert kept_bytes(case.fused, arguments, save="recompute") <= 0.01 * eager
