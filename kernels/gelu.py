"""GELU and its derivative as Triton device functions.

Two forms: the exact one (erf), which is what timm's ViTs use, and tanh for models trained with it.

The exact form has two implementations. For fp32 and fp64 it calls erf. For bf16 and fp16 it evaluates
`Phi(x) = 1 - q if x >= 0 else q` with `q = exp2(P(|x|))` and P of degree 5: 9 instructions where libdevice's
erf takes 32, and the epilogue of a short GEMM (K = 768) is bound by exactly those instructions. Its absolute
error is 8.4e-7 for gelu and 1.2e-6 for gelu', below half a bf16 or fp16 step wherever the value is not itself
that small. P was fitted by weighted least squares to log2(Phi(-z)) on [0, 6]; its leading coefficient is
negative, so q goes to 0 and not to infinity for every larger |x|.
"""

import triton
import triton.language as tl

# The interpreter multiplies raw bit patterns in a bf16 `tl.dot` and truncates fp32 -> bf16 (Triton 3.6 and
# 3.7 at least), so the kernels take another path there. Fixed when Triton decorates the kernels: at import.
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
    # Beyond |x| = 20 both are saturated; unclamped, x**3 overflows and 0 * inf makes a NaN of a finite input.
    c = tl.minimum(tl.maximum(x, -20.0), 20.0)
    u = 2.0 * SQRT_TWO_OVER_PI * c * (1.0 + TANH_CUBIC * c * c)
    s = 1.0 / (1.0 + tl.exp2(u * -LOG2_E))
    du = 2.0 * SQRT_TWO_OVER_PI * (1.0 + 3.0 * TANH_CUBIC * c * c)
    return s, s * (1.0 - s) * du


@triton.jit
def gelu_and_grad(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """(gelu(x), gelu'(x)) of an fp32 or fp64 block; what the caller does not use costs nothing.

    ACTIVATION is "gelu", "gelu_tanh" or "none" (x and 1). EXACT picks erf over the polynomial.
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
    """`x` in `dtype`, rounded to nearest even, in the interpreter too."""
    if INTERPRET and dtype == tl.bfloat16:
        # NaNs skip the carry, which would turn some of them into infinity or zero.
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        carried = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        bits = tl.where(x == x, carried, bits)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(dtype)
