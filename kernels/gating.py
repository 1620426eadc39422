"""The gate of a gated MLP, act(gate) * value, as a Triton device function and as pointwise kernels.

The activations are SiLU (SwiGLU) and both forms of GELU (GEGLU), see arXiv:2002.05202.

Must not know matrix products or tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from scalevit.kernels.gelu import LOG2_E, gelu_and_grad, numerics, round_to


@triton.jit
def gate_and_grad(gate, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """(act(gate), act'(gate)) of an fp32 or fp64 block. ACTIVATION: "silu", or as in `gelu_and_grad`, as EXACT is."""
    if ACTIVATION == "silu":
        # The exponential of a large negative gate overflows to infinity, which gives 0, as it should.
        logistic = 1.0 / (1.0 + tl.exp2(gate * -LOG2_E))
        value = gate * logistic
        return value, logistic + value * (1.0 - logistic)
    else:
        return gelu_and_grad(gate, ACTIVATION, EXACT)


# Rows and columns per program: 8 elements for each of 128 threads, so that 2-byte loads are 16 bytes wide.
GATE_BLOCK = (4, 256)


@triton.jit
def gate_forward_kernel(
    gate, value, post, M, N, stride, stride_post, ACTIVATION: tl.constexpr, SAVE_FACTORS: tl.constexpr,
    EXACT: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """post = act(gate) * value, which may use gate's memory.

    With SAVE_FACTORS gate and value become what the gradient of post is multiplied by to give theirs:
    value * act'(gate) and act(gate).
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    at = rows[:, None] * stride + cols[None, :]
    v = tl.load(value + at, mask=mask, other=0.0).to(ACC)
    activated, slope = gate_and_grad(tl.load(gate + at, mask=mask, other=0.0).to(ACC), ACTIVATION, EXACT)
    if SAVE_FACTORS:
        tl.store(gate + at, round_to(v * slope, gate.dtype.element_ty), mask=mask)
        tl.store(value + at, round_to(activated, value.dtype.element_ty), mask=mask)
    at = rows[:, None] * stride_post + cols[None, :]
    tl.store(post + at, round_to(activated * v, post.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward_kernel(
    dpost, gate, value, dgate, dvalue, post, M, N, stride, stride_post, ACTIVATION: tl.constexpr, SAVED: tl.constexpr,
    EXACT: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dgate and dvalue; gate and value are the factors, or "pre", which also gives post (it may be dpost).

    stride: of the rows of gate, value, dgate and dvalue; stride_post: of dpost and post.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    at = rows[:, None] * stride + cols[None, :]
    post_at = rows[:, None] * stride_post + cols[None, :]
    gradient = tl.load(dpost + post_at, mask=mask, other=0.0).to(ACC)
    gate_factor = tl.load(gate + at, mask=mask, other=0.0).to(ACC)
    value_factor = tl.load(value + at, mask=mask, other=0.0).to(ACC)
    if SAVED == "pre":
        activated, slope = gate_and_grad(gate_factor, ACTIVATION, EXACT)
        tl.store(post + post_at, round_to(activated * value_factor, post.dtype.element_ty), mask=mask)
        gate_factor = value_factor * slope
        value_factor = activated
    tl.store(dgate + at, round_to(gradient * gate_factor, dgate.dtype.element_ty), mask=mask)
    tl.store(dvalue + at, round_to(gradient * value_factor, dvalue.dtype.element_ty), mask=mask)


def _grid(m: int, n: int) -> tuple[int, int]:
    return triton.cdiv(m, GATE_BLOCK[0]), triton.cdiv(n, GATE_BLOCK[1])


def gate_forward(gate: Tensor, value: Tensor, *, activation: str, save: str) -> Tensor:
    """post (M, N) = act(gate) * value.

    gate, value: (M, N), with one row stride and unit inner strides. save: "pre" leaves them, "slope" replaces them by
    the factors of the backward, see `gate_forward_kernel`, "none" writes post into gate's memory.
    """
    post = gate if save == "none" else gate.new_empty(gate.shape)
    if gate.numel():
        gate_forward_kernel[_grid(*gate.shape)](
            gate, value, post, *gate.shape, gate.stride(0), post.stride(0), ACTIVATION=activation,
            SAVE_FACTORS=save == "slope", BM=GATE_BLOCK[0], BN=GATE_BLOCK[1], enable_fp_fusion=True,
            **numerics(gate.dtype),
        )  # fmt: skip
    return post


def gate_backward(
    dpost: Tensor, gate: Tensor, value: Tensor, dgate: Tensor, dvalue: Tensor, *, activation: str, save: str
) -> Tensor | None:
    """Fills dgate and dvalue; returns post (M, N), in dpost's memory, if `save` is "pre", else None.

    dpost: (M, N) contiguous; gate, value: what `gate_forward` left for the same `save`, "slope" or "pre"; these and
    dgate, dvalue: (M, N), with one row stride and unit inner strides.
    """
    if dpost.numel():
        gate_backward_kernel[_grid(*dpost.shape)](
            dpost, gate, value, dgate, dvalue, dpost if save == "pre" else None, *dpost.shape, gate.stride(0),
            dpost.stride(0), ACTIVATION=activation, SAVED=save, BM=GATE_BLOCK[0], BN=GATE_BLOCK[1],
            enable_fp_fusion=True, **numerics(dpost.dtype),
        )  # fmt: skip
    return dpost if save == "pre" else None
