"""The criterion of the kernel tests itself: it holds in any order of summation, and a wrong MLP fails it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Case, compare, gradient_of, make_arguments, run
from scalevit.kernels import eager_mlp
from scalevit.kernels.reference import APPROXIMATE

Product = Callable[[Tensor, Tensor], Tensor]


def one_sum(a: Tensor, b: Tensor) -> Tensor:
    """Term after term, with a rounding to fp32 after each."""
    total = a.new_zeros(a.shape[0], b.shape[1], dtype=torch.float32)
    for k in range(a.shape[1]):
        total += a[:, k, None].float() * b[k].float()
    return total


def reversed_sum(a: Tensor, b: Tensor) -> Tensor:
    return one_sum(a.flip(1), b.flip(0))


def sum_of_blocks(a: Tensor, b: Tensor) -> Tensor:
    return sum(one_sum(x, y) for x, y in zip(a.split(5, 1), b.split(5, 0), strict=True))


def pairwise_sum(a: Tensor, b: Tensor) -> Tensor:
    terms = a.float()[:, :, None] * b.float()[None]
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        rest = terms[:, 2 * half :]
        terms = torch.cat([terms[:, :half] + terms[:, half : 2 * half], rest], 1)
    return terms[:, 0]


def largest_first(a: Tensor, b: Tensor) -> Tensor:
    """By the size of b's rows: the partial sums are large from the start."""
    order = b.double().norm(dim=1).argsort(descending=True)
    return one_sum(a[:, order], b[order])


def exact_sum(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double()


def library_sum(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float()


ORDERS = (one_sum, reversed_sum, sum_of_blocks, pairwise_sum, largest_first, exact_sum, library_sum)


def slope_of(pre: Tensor, activation: str) -> Tensor:
    with torch.enable_grad():
        pre = pre.detach().requires_grad_()
        return torch.autograd.grad(F.gelu(pre, approximate=APPROXIMATE[activation]).sum(), pre)[0]


def mlp_by_hand(
    arguments: list[Tensor | None],
    case: Case,
    product: Product,
    *,
    slope_of: Callable[[Tensor, str], Tensor] = slope_of,
    hidden: Callable[[Tensor], Tensor] = lambda post: post,
) -> list[Tensor]:
    """What `run` returns, one operation after the other, as "fast" stores them; the last two are for faults."""
    dtype = case.dtype
    x, w1, b1, w2, b2 = (None if t is None else t.detach() for t in arguments)
    rows = x.reshape(-1, case.d)
    width = case.width or case.h
    pre = product(rows, w1[:width].T).float()
    pre = pre if b1 is None else pre + b1[:width].float()
    post = hidden(F.gelu(pre, approximate=APPROXIMATE[case.activation]).to(dtype))
    y = product(post, w2[:, :width].T).float()
    y = (y if b2 is None else y + b2.float()).to(dtype)
    dy = gradient_of(y.view(*case.rows, -1)).to(dtype).view_as(y)
    slope = slope_of(pre, case.activation).to(dtype)
    dpre = (product(dy, w2[:, :width]).float() * slope.float()).to(dtype)
    ones = rows.new_ones(1, len(rows))
    grads = [product(dpre, w1[:width]), product(dpre.T, rows), product(ones, dpre), product(dy.T, post)]
    dx, dw1, db1, dw2 = (t.to(dtype) for t in grads)
    rest = case.h - width
    results = [y.view(*case.rows, -1), dx.view_as(x), F.pad(dw1, (0, 0, 0, rest))]
    results += [] if b1 is None else [F.pad(db1[0], (0, rest))]
    return [*results, F.pad(dw2, (0, rest)), *([] if b2 is None else [product(ones, dy)[0].to(dtype)])]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASE = [Case(dtype=dtype, activation=activation) for dtype in DTYPES for activation in ("gelu", "gelu_tanh")]
# fp16 ends at 65504, which products of such weights exceed.
STEEP = [replace(case, scale=1e4) for case in BASE if case.dtype != torch.float16]
NARROW = [Case(dtype=dtype, width=48, biases=(False, False)) for dtype in DTYPES]


def check(results: list[Tensor], arguments: list[Tensor | None], case: Case) -> None:
    compare(results, run(eager_mlp, arguments, case), arguments, case)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", [*BASE, *STEEP, *NARROW], ids=str)
def test_every_order_of_summation_passes(case, order):
    for seed in range(3):
        arguments = make_arguments(case, seed=seed)
        check(mlp_by_hand(arguments, case, order), arguments, case)


def rounded_to_bf16(a: Tensor, b: Tensor) -> Tensor:
    """Sums that are rounded to bf16 after every 4 terms."""
    total = torch.zeros(())
    for x, y in zip(a.split(4, 1), b.split(4, 0), strict=True):
        total = (total + x.float() @ y.float()).bfloat16()
    return total


def in_tf32(a: Tensor, b: Tensor) -> Tensor:
    """Ten bits of each factor."""
    short = [((t.float().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for t in (a, b)]
    return short[0] @ short[1]


def without_the_last_term(a: Tensor, b: Tensor) -> Tensor:
    return library_sum(a[:, :-1], b[:-1])


def with_one_term_twice(a: Tensor, b: Tensor) -> Tensor:
    return library_sum(torch.cat([a, a[:, :1]], 1), torch.cat([b, b[:1]]))


def without_the_density(pre: Tensor, activation: str) -> Tensor:
    """gelu' without x * phi(x)."""
    return torch.special.ndtr(pre.double()).float()


def with_a_wrong_constant(pre: Tensor, activation: str) -> Tensor:
    """1 % more of x * phi(x)."""
    density = torch.exp(-(pre.double() ** 2) / 2) / math.sqrt(2 * math.pi)
    return slope_of(pre, activation) + (0.01 * pre * density).float()


def without_one_row(post: Tensor) -> Tensor:
    return post * (torch.arange(len(post)) != 5)[:, None]


def of_another_row(post: Tensor) -> Tensor:
    return post.roll(1, 0)


@pytest.mark.parametrize(
    ("product", "case"),
    [
        *itertools.product((rounded_to_bf16, without_the_last_term, with_one_term_twice), (*BASE, *STEEP, *NARROW)),
        # bf16 and fp16 have no more than ten bits.
        *((in_tf32, case) for case in (*BASE, *STEEP, *NARROW) if case.dtype == torch.float32),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrong_product_is_seen(case, product):
    arguments = make_arguments(case)
    with pytest.raises(AssertionError, match="of a value"):
        check(mlp_by_hand(arguments, case, product), arguments, case)


@pytest.mark.parametrize(
    ("faulty", "case"),
    [
        *((without_the_density, case) for case in BASE),
        # bf16 itself rounds by up to 0.4 %; `test_gelu_kernels` tests its every value.
        *((with_a_wrong_constant, case) for case in BASE if case.dtype != torch.bfloat16),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrong_derivative_is_seen(case, faulty):
    arguments = make_arguments(case)
    with pytest.raises(AssertionError, match="of a value"):
        check(mlp_by_hand(arguments, case, library_sum, slope_of=faulty), arguments, case)


@pytest.mark.parametrize("hidden", [without_one_row, of_another_row])
@pytest.mark.parametrize("case", [*BASE, *STEEP, *NARROW], ids=str)
def test_wrong_rows_are_seen(case, hidden):
    arguments = make_arguments(case)
    with pytest.raises(AssertionError, match="of a value"):
        check(mlp_by_hand(arguments, case, library_sum, hidden=hidden), arguments, case)


@pytest.mark.parametrize("case", [*BASE, *STEEP], ids=str)
@pytest.mark.parametrize("width", [80, 48])
def test_a_wrong_width_is_seen(case, width):
    arguments = make_arguments(case)
    with pytest.raises(AssertionError, match="of a value"):
        check(mlp_by_hand(arguments, replace(case, width=width), library_sum), arguments, case)
    with pytest.raises(AssertionError, match="of a value"):
        check(mlp_by_hand(arguments, case, library_sum), arguments, replace(case, width=width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_other_activation_is_seen(dtype):
    """They differ by up to 5e-4."""
    arguments = make_arguments(Case(dtype=dtype))
    results = mlp_by_hand(arguments, Case(dtype=dtype, activation="gelu_tanh"), library_sum)
    with pytest.raises(AssertionError, match="of a value"):
        check(results, arguments, Case(dtype=dtype))


def test_a_sum_rounded_before_the_bias_is_seen():
    """Where the two cancel, that loses more than the result's own rounding."""
    case = next(case for case in STEEP if case.dtype == torch.bfloat16)
    arguments = make_arguments(case)
    with pytest.raises(AssertionError, match="of a value"):
        check(mlp_by_hand(arguments, case, lambda a, b: library_sum(a, b).bfloat16()), arguments, case)


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("case", BASE, ids=str)
def test_one_wrong_element_is_seen(case, index):
    """By a hundredth of the largest value in fp32 and fp16, by a tenth in bf16."""
    arguments = make_arguments(case)
    results = mlp_by_hand(arguments, case, library_sum)
    worst = results[index].abs().max()
    results[index].flatten()[7] += worst * (0.1 if case.dtype == torch.bfloat16 else 0.01)
    with pytest.raises(AssertionError, match="of a value"):
        check(results, arguments, case)


def test_a_gradient_beyond_the_width_is_seen():
    case = NARROW[0]
    arguments = make_arguments(case)
    results = mlp_by_hand(arguments, case, library_sum)
    results[2][-1, -1] = 1e-30
    with pytest.raises(AssertionError, match="fc1_weight"):
        check(results, arguments, case)
