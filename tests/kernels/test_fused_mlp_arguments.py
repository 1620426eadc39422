"""fused_mlp on a CPU without the interpreter: the eager path, and what it refuses."""

import subprocess
import sys
import warnings

import pytest
import torch

from kernel_cases import Case, make_arguments
from scalevit.kernels import eager_mlp, fused_mlp

CASE = Case(rows=(2, 3), d=16, h=32, d_out=16)


@pytest.fixture
def arguments():
    return dict(zip(("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"), make_arguments(CASE), strict=True))


def test_a_cpu_runs_eagerly_and_silently(arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fused_mlp(**arguments, width=16), eager_mlp(**arguments, width=16))


def test_triton_on_a_cpu_is_refused(arguments):
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: .*CPU"):
        fused_mlp(**arguments, backend="triton")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(2, 3, 15)), ("x", torch.zeros(())), ("x", torch.zeros(2, 0)),
        ("fc1_weight", torch.zeros(32)), ("fc1_weight", torch.zeros(32, 17)),
        ("fc1_weight", torch.zeros(0, 16)),
        ("fc1_bias", torch.zeros(31)), ("fc1_bias", torch.zeros(32, 1)),
        ("fc2_weight", torch.zeros(16, 31)), ("fc2_weight", torch.zeros(1, 16, 32)),
        ("fc2_bias", torch.zeros(17)),
        ("width", 0), ("width", -16), ("width", 48), ("width", 24),
        ("activation", "relu"), ("save", "slow"), ("backend", "cuda"),
        ("fc1_weight", torch.zeros(32, 16, device="meta")),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_named(arguments, name, value):
    # A wrong x shows as a weight that does not fit it; the message names both.
    with pytest.raises(ValueError, match=name):
        fused_mlp(**arguments | {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(2, 16, dtype=torch.int64)), ("x", [[1.0]]), ("fc1_weight", None), ("fc2_weight", 3),
        ("fc1_weight", torch.zeros(32, 16, dtype=torch.bfloat16)), ("fc2_bias", torch.zeros(16).double()),
        ("width", 16.0), ("width", 32.0), ("width", True), ("width", "16"),
    ],
)  # fmt: skip
def test_types_that_do_not_fit_are_named(arguments, name, value):
    with pytest.raises(TypeError, match=name):
        fused_mlp(**arguments | {name: value})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_dtypes_without_arithmetic_are_named(arguments, dtype):
    """All alike, so that nothing but the dtype is wrong."""
    with pytest.raises(TypeError, match="x must be fp32, bf16, fp16 or fp64; got " + str(dtype)):
        fused_mlp(**{name: t.detach().to(dtype) for name, t in arguments.items()})


def test_no_dtype_passes_unseen(arguments):
    """Mixed dtypes are an error without autocast, and autocast's business with it."""
    arguments["fc1_weight"] = arguments["fc1_weight"].detach().bfloat16()
    with pytest.raises(TypeError, match="fc1_weight"):
        fused_mlp(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_mlp(**arguments).dtype == torch.bfloat16


def test_meta_tensors_have_shapes():
    arguments = [t.detach().to("meta") for t in make_arguments(CASE)]
    assert fused_mlp(*arguments).shape == (2, 3, 16)


def test_compiles_whole_without_triton(arguments):
    compiled = torch.compile(lambda **a: fused_mlp(**a, width=16), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), fused_mlp(**arguments, width=16))


def test_works_without_triton():
    """Triton is published for Linux only; elsewhere importing and the eager path need only torch."""
    script = """
import sys
sys.modules["triton"] = None
import torch
from scalevit.kernels import fused_mlp
x, w1, w2 = torch.randn(2, 16), torch.randn(32, 16), torch.randn(16, 32)
assert fused_mlp(x, w1, None, w2, None).shape == (2, 16)
try:
    fused_mlp(x, w1, None, w2, None, backend="triton")
except RuntimeError as error:
    assert "Triton cannot be imported" in str(error), error
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
