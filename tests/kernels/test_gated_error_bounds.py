"""The criterion of the tests of gated MLPs: a correct one passes in any order of multiplication, a wrong one fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gated_cases import MIXED, GatedCase
from kernel_cases import compare, gradient_of, run
from scalevit.kernels.reference import GATES

CASES = [
    *(replace(case, form="separate") for case in MIXED),
    GatedCase(dtype=torch.bfloat16, width=32),
    GatedCase(scale=1e4, activation="gelu"),
]


def gated_by_hand(case: GatedCase, arguments: list[Tensor], fault: str = "") -> list[Tensor]:
    """What `run` returns, rounded where "fast" stores, with one fault."""
    dtype, width = case.dtype, case.width or case.h

    def stored(value: Tensor) -> Tensor:
        return value.to(dtype).double()

    x, gate_w, gate_b, value_w, value_b, w2, b2 = (t.detach().double() for t in arguments)
    used = [t[:width] for t in (gate_w, gate_b, value_w, value_b)]
    pre = (x @ used[0].T + used[1]).requires_grad_()
    activated = GATES[case.activation](pre)
    (slope,) = torch.autograd.grad(activated.sum(), pre)
    activated = activated.detach()
    value = x @ used[2].T + used[3]
    if fault == "other activation":
        activated = GATES["gelu" if case.activation == "silu" else "silu"](pre).detach()
    post = stored(
        pre.detach() * GATES[case.activation](value) if fault == "gate and value exchanged" else activated * value
    )
    y = post @ w2[:, :width].T + (0 if fault == "no bias" else b2)
    dy = gradient_of(y).to(dtype).double()
    dpost = dy @ w2[:, :width]
    factor = activated if fault == "slope forgotten" else value * slope
    dgate = stored(dpost * stored(factor))
    dvalue = stored(dpost * stored(value if fault == "factors exchanged" else activated))
    dx = dgate @ used[0] + (0 if fault == "one term of dx" else dvalue @ used[2])
    gradients = [dgate.T @ x, dgate.sum(0), dvalue.T @ x, dvalue.sum(0)]
    whole = [torch.zeros_like(t) for t in (gate_w, gate_b, value_w, value_b, w2)]
    for out, part in zip(whole, gradients, strict=False):
        out[:width] = part
    whole[4][:, :width] = dy.T @ post
    if fault == "something beyond the width":
        whole[2][-1, -1] = 1e-30
    return [t.to(dtype) for t in (y, dx, *whole, dy.sum(0))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_correct_one_passes(case):
    for seed in range(2):
        arguments = case.arguments(seed=seed)
        compare(gated_by_hand(case, arguments), run(case.eager, arguments, case), arguments, case)


@pytest.mark.parametrize(
    "fault",
    [
        "other activation",
        "gate and value exchanged",
        "slope forgotten",
        "factors exchanged",
        "one term of dx",
        "no bias",
    ],
)
def test_a_wrong_one_is_seen(fault):
    # Gates near 1e4 make the same of all activations, and hide a bias in the rounding of y.
    hidden = fault in ("other activation", "no bias")
    for case in (c for c in CASES if c.scale == 1 or not hidden):
        arguments = case.arguments()
        with pytest.raises(AssertionError, match="of a value"):
            compare(gated_by_hand(case, arguments, fault), run(case.eager, arguments, case), arguments, case)


@pytest.mark.parametrize("index", range(8))
def test_one_wrong_element_is_seen(index):
    for case in CASES[:9]:
        arguments = case.arguments()
        results = gated_by_hand(case, arguments)
        # In bf16 a tenth of the largest value is a few dozen roundings; fp32 and fp16 resolve a hundredth.
        worst = results[index].abs().max()
        results[index].flatten()[7] += worst * (0.1 if case.dtype == torch.bfloat16 else 0.01)
        with pytest.raises(AssertionError, match="of a value"):
            compare(results, run(case.eager, arguments, case), arguments, case)


def test_a_gradient_beyond_the_width_is_seen():
    case = CASES[-2]
    arguments = case.arguments()
    results = gated_by_hand(case, arguments, "something beyond the width")
    with pytest.raises(AssertionError, match="value_weight"):
        compare(results, run(case.eager, arguments, case), arguments, case)
