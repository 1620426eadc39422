"""fused_gated_mlp on a CPU without the interpreter: the eager path, timm's modules, and what it refuses."""

import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from gated_cases import GatedCase
from scalevit.kernels import fused_gated_mlp, fused_packed_gated_mlp

CASE = GatedCase(rows=(2, 3), d=16, h=32, d_out=16)
PACKED = replace(CASE, form="gate_first")


@pytest.fixture
def separate():
    return dict(zip(CASE.names, CASE.arguments(), strict=True))


@pytest.fixture
def packed():
    return dict(zip(PACKED.names, PACKED.arguments(), strict=True))


@pytest.mark.parametrize("case", [CASE, PACKED, replace(CASE, form="gate_last")], ids=str)
def test_a_cpu_runs_eagerly_and_silently(case):
    arguments = case.arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in (case.options, case.options | {"width": 16, "activation": "gelu"}):
            assert torch.equal(case.fused(*arguments, **options), case.eager(*arguments, **options))
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: .*CPU"):
        case.fused(*arguments, backend="triton")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("gate_last", "name"), [(False, "SiLU"), (True, "SiLU"), (True, "GELU"), (False, "GELUTanh")])
def test_packed_weights_are_those_of_timms_glu_mlp(gate_last, name, bias):
    layers = pytest.importorskip("timm.layers")
    act, activation = {
        "SiLU": (torch.nn.SiLU, "silu"), "GELU": (torch.nn.GELU, "gelu"), "GELUTanh": (layers.GELUTanh, "gelu_tanh"),
    }[name]  # fmt: skip
    mlp = layers.GluMlp(16, 64, act_layer=act, gate_last=gate_last, bias=bias)
    if name == "SiLU" and not gate_last:
        mlp = layers.SwiGLUPacked(16, 64, bias=bias)
    x = torch.randn(2, 3, 16)
    y = fused_packed_gated_mlp(
        x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, gate_last=gate_last, activation=activation
    )
    assert torch.equal(y, mlp(x))


@pytest.mark.parametrize("bias", [True, False])
def test_separate_weights_are_those_of_timms_swiglu(bias):
    mlp = pytest.importorskip("timm.layers").SwiGLU(16, 32, bias=bias)
    x = torch.randn(2, 3, 16)
    gate, value, fc2 = mlp.fc1_g, mlp.fc1_x, mlp.fc2
    y = fused_gated_mlp(x, gate.weight, gate.bias, value.weight, value.bias, fc2.weight, fc2.bias)
    assert torch.equal(y, mlp(x))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(()), r"x must be \(\.\.\., D\); got a scalar"),
        ("gate_weight", torch.zeros(32, 17), r"gate_weight must be \(H, 16\) to match x; got \(32, 17\)"),
        ("gate_weight", torch.zeros(0, 16), "value_weight"),
        ("value_weight", torch.zeros(48, 16), r"value_weight must be \(32, 16\) to match gate_weight; got \(48, 16\)"),
        ("gate_bias", torch.zeros(31), r"gate_bias must be \(32,\) or None; got \(31,\)"),
        ("value_bias", torch.zeros(64), r"value_bias must be \(32,\) or None; got \(64,\)"),
        ("fc2_weight", torch.zeros(16, 64), r"fc2_weight must be \(D_out, 32\) to match gate_weight; got \(16, 64\)"),
        ("fc2_bias", torch.zeros(17), r"fc2_bias must be \(16,\) or None"),
        ("width", 24, "width must be a multiple of 16 from 16 to 32; got 24"),
        ("activation", "sigmoid", "activation must be one of silu, gelu, gelu_tanh; got 'sigmoid'"),
        ("save", "slow", "save must be one of fast, lean, recompute; got 'slow'"),
        ("backend", "cuda", "backend must be one of auto, triton, eager; got 'cuda'"),
        ("value_weight", torch.zeros(32, 16, device="meta"), "value_weight is on meta and x on cpu"),
    ],
)
def test_values_that_do_not_fit_are_named(separate, name, value, message):
    with pytest.raises(ValueError, match=message):
        fused_gated_mlp(**separate | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fc1_weight", torch.zeros(63, 16), r"fc1_weight must be \(2 \* H, 16\) to match x; got \(63, 16\)"),
        ("fc1_bias", torch.zeros(32), r"fc1_bias must be \(64,\) or None; got \(32,\)"),
        ("fc2_weight", torch.zeros(16, 64), r"fc2_weight must be \(D_out, 32\) to match fc1_weight; got \(16, 64\)"),
        ("width", 64, "width must be a multiple of 16 from 16 to 32; got 64"),
    ],
)
def test_packed_values_that_do_not_fit_are_named(packed, name, value, message):
    with pytest.raises(ValueError, match=message):
        fused_packed_gated_mlp(**packed | {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(2, 16, dtype=torch.int64)), ("gate_weight", None), ("value_weight", None),
        ("value_weight", torch.zeros(32, 16, dtype=torch.bfloat16)), ("width", 16.0), ("width", True),
    ],
)  # fmt: skip
def test_types_that_do_not_fit_are_named(separate, name, value):
    with pytest.raises(TypeError, match=name):
        fused_gated_mlp(**separate | {name: value})


@pytest.mark.parametrize("case", [CASE, PACKED], ids=str)
def test_meta_tensors_have_shapes(case):
    assert case.fused(*(t.detach().to("meta") for t in case.arguments())).shape == (2, 3, 16)


@pytest.mark.parametrize("case", [CASE, PACKED], ids=str)
def test_compiles_whole_without_triton(case):
    compiled = torch.compile(case.fused, fullgraph=True, backend="aot_eager")
    arguments = case.arguments()
    torch.testing.assert_close(compiled(*arguments, width=16), case.fused(*arguments, width=16))


def test_works_without_triton():
    """Triton is published for Linux only; elsewhere importing and the eager path need only torch."""
    script = """
import sys
sys.modules["triton"] = None
import torch
from scalevit.kernels import fused_packed_gated_mlp
x, w1, w2 = torch.randn(2, 16), torch.randn(64, 16), torch.randn(16, 32)
assert fused_packed_gated_mlp(x, w1, None, w2, None).shape == (2, 16)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
