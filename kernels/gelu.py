"""GELU and its derivative as Triton device functions, and pointwise kernels that apply them.

There are two forms: the exact one (erf), which timm's ViTs use, and the tanh approximation for models trained with it.

The exact form has two implementations. For fp32 and fp64 it calls erf. For bf16 and fp16 it evaluates
`Phi(x) = 1 - q if x >= 0 else q` with `q = exp2(P(|x|))` and P of degree 5: 9 instructions where libdevice's
erf takes 32, and these instructions limit the epilogue of a short GEMM (K = 768). The absolute error is 8.4e-7 for
gelu and 1.2e-6 for gelu', below half a bf16 or fp16 step except where the value itself is that small. P was fitted by
weighted least squares to log2(Phi(-z)) on [0, 6]; its leading coefficient is negative, so q tends to 0 and not to
infinity for larger |x|.

Must not know matrix products or tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter multiplies raw bit patterns in a bf16 `tl.dot` and truncates fp32 -> bf16 (at least in Triton 3.6 and
# 3.7), so the kernels use other code there. Triton reads the setting when it decorates the kernels: at import.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
RSQRT_TWO_PI = tl.constexpr(0.3989422804014327)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _fast_cdf(x):
    z = tl.abs(x)
    p = 0.00722960606 + z * -0.000492505118
    p = -0.0522208019 + z * p
    p = -0.459526393 + z * p
    p = -1.15101805 + z * p
    q = tl.exp2(-1.00000329 + z * p)
    return tl.where(x >= 0, 1.0 - q, q)


@triton.jit
def _exact_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def _tanh_cdf(x):
    """The logistic function that the tanh form uses for Phi, and its derivative."""
    # Beyond |x| = 20 both are saturated; without the clamp x**3 overflows and 0 * inf is NaN for a finite input.
    c = tl.minimum(tl.maximum(x, -20.0), 20.0)
    u = 2.0 * SQRT_TWO_OVER_PI * c * (1.0 + TANH_CUBIC * c * c)
    s = 1.0 / (1.0 + tl.exp2(u * -LOG2_E))
    du = 2.0 * SQRT_TWO_OVER_PI * (1.0 + 3.0 * TANH_CUBIC * c * c)
    return s, s * (1.0 - s) * du


@triton.jit
def gelu_and_grad(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """(gelu(x), gelu'(x)) of an fp32 or fp64 block; the compiler removes a result that the caller does not use.

    ACTIVATION is "gelu", "gelu_tanh" or "none" (x and 1). EXACT selects erf instead of the polynomial.
    """
    if ACTIVATION == "none":
        return x, tl.full(x.shape, 1.0, x.dtype)
    elif ACTIVATION == "gelu_tanh":
        cdf, slope = _tanh_cdf(x)
        return x * cdf, cdf + x * slope
    else:
        cdf = _exact_cdf(x) if EXACT else _fast_cdf(x)
        pdf = tl.exp2(x * x * (-0.5 * LOG2_E)) * RSQRT_TWO_PI
        return x * cdf, cdf + x * pdf


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """`x` in `dtype`, rounded to nearest even, also in the interpreter."""
    if INTERPRET and dtype == tl.bfloat16:
        # NaNs are not rounded: the carry would turn some of them into infinity or zero.
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        carried = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        bits = tl.where(x == x, carried, bits)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(dtype)


# Pointwise kernels, for the products that a plan leaves to torch's matrix product.


@triton.jit
def gelu_forward_kernel(
    pre, post, slope, SIZE, ACTIVATION: tl.constexpr, SAVE_SLOPE: tl.constexpr, EXACT: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """post = act(pre), and slope = act'(pre); each output may use pre's memory."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, derivative = gelu_and_grad(tl.load(pre + at, mask=at < SIZE, other=0.0).to(ACC), ACTIVATION, EXACT)
    tl.store(post + at, round_to(value, post.dtype.element_ty), mask=at < SIZE)
    if SAVE_SLOPE:
        tl.store(slope + at, round_to(derivative, slope.dtype.element_ty), mask=at < SIZE)


@triton.jit
def gelu_backward_kernel(
    dpost, saved, dpre, post, SIZE, ACTIVATION: tl.constexpr, SAVED: tl.constexpr, EXACT: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dpre = dpost * slope; `saved` is the slope, or "pre", which also gives post. dpre may be dpost."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(dpost + at, mask=at < SIZE, other=0.0).to(ACC)
    derivative = tl.load(saved + at, mask=at < SIZE, other=0.0).to(ACC)
    if SAVED == "pre":
        value, derivative = gelu_and_grad(derivative, ACTIVATION, EXACT)
        tl.store(post + at, round_to(value, post.dtype.element_ty), mask=at < SIZE)
    tl.store(dpre + at, round_to(gradient * derivative, dpre.dtype.element_ty), mask=at < SIZE)


def numerics(dtype: torch.dtype) -> dict[str, object]:
    """The constexprs that depend on the dtype: whether GELU calls erf, and the dtype of accumulators."""
    return {
        "EXACT": dtype in (torch.float32, torch.float64),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over channels or tokens; "ACC" of `numerics` for torch."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Elements per program: 8 for each of 128 threads, so that 2-byte loads are 16 bytes wide.
POINTWISE_BLOCK = 1024


def gelu_forward(pre: Tensor, *, activation: str, save: str) -> tuple[Tensor, Tensor | None]:
    """(post, saved) of a contiguous pre-activation, which is overwritten or returned, never copied.

    save: "slope" returns act'(pre) in pre's memory, "pre" returns pre itself, "none" writes post into pre's memory.
    """
    post = pre if save == "none" else torch.empty_like(pre)
    if pre.numel():
        gelu_forward_kernel[(triton.cdiv(pre.numel(), POINTWISE_BLOCK),)](
            pre, post, pre, pre.numel(), ACTIVATION=activation, SAVE_SLOPE=save == "slope",
            BLOCK=POINTWISE_BLOCK, enable_fp_fusion=True, **numerics(pre.dtype),
        )  # fmt: skip
    return post, None if save == "none" else pre


def gelu_backward(dpost: Tensor, saved: Tensor, *, activation: str, save: str) -> tuple[Tensor, Tensor | None]:
    """(dpre, post): dpre in dpost's memory; post recomputed if `saved` is the pre-activation, else None.

    dpost, saved: contiguous, of equal shape. save: what `saved` is, "slope" or "pre".
    """
    post = torch.empty_like(saved) if save == "pre" else None
    if dpost.numel():
        gelu_backward_kernel[(triton.cdiv(dpost.numel(), POINTWISE_BLOCK),)](
            dpost, saved, dpost, post, dpost.numel(), ACTIVATION=activation, SAVED=save,
            BLOCK=POINTWISE_BLOCK, enable_fp_fusion=True, **numerics(dpost.dtype),
        )  # fmt: skip
    return dpost, post
