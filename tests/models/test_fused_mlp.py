"""What becomes of a model's MLPs, by config and device."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import nn

from launching import SECONDS
from scalevit.config.model import KernelsConfig
from scalevit.errors import SettingError, UserError
from scalevit.models.fused_mlp import FusedMlp, fuse_mlps, fused
from scalevit.models.mlps import MlpView

CPU = torch.device("cpu")


KINDS = {
    "plain": partial(Mlp, 16, 32),
    "tanh": partial(Mlp, 16, 32, act_layer=partial(nn.GELU, approximate="tanh")),
    "gate first": partial(SwiGLUPacked, 16, 64),
    "gate last": partial(GluMlp, 16, 64, act_layer=nn.GELU),
    "separate": partial(SwiGLU, 16, 32),
}


class Block(nn.Module):
    def __init__(self, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.mlp = mlp or Mlp(16, 32)


class Model(nn.Module):
    def __init__(self, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(mlp))


def test_triton_without_a_device_is_refused_at_build_time():
    with pytest.raises(SettingError, match=r'kernels\.mlp = "triton": the tensors are on a CPU .*: use .auto'):
        fuse_mlps(Model(), KernelsConfig(mlp="triton"), CPU)


@pytest.mark.parametrize(("value", "status"), [("0", 1), ("1", 0)])
def test_the_interpreter_is_what_triton_says_it_is(value, status):
    """TRITON_INTERPRET=0 is off, whatever its truth as a string."""
    script = """
import sys, torch
from scalevit.kernels import unsupported_reason
sys.exit(bool(unsupported_reason(torch.device("cpu"))))
"""
    environment = os.environ | {"TRITON_INTERPRET": value}
    done = subprocess.run([sys.executable, "-c", script], env=environment, timeout=SECONDS)
    assert done.returncode == status


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_timm_does_under_the_same_names(kind: str) -> None:
    torch.manual_seed(0)
    mlp = KINDS[kind]().double()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    ours = fused(mlp, save="fast", backend="eager")
    assert list(ours.state_dict()) == list(mlp.state_dict())
    # In fp64 only the order of summation differs.
    torch.testing.assert_close(ours(x), mlp(x), rtol=1e-12, atol=1e-12)
    ours.width = 16
    narrow = ours(x)
    MlpView(mlp).narrow(16)
    torch.testing.assert_close(narrow, mlp(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_fused(kind: str) -> None:
    model = Model(KINDS[kind]())
    fuse_mlps(model, KernelsConfig(), CPU)
    assert isinstance(model.blocks[0].mlp, FusedMlp)


@pytest.mark.parametrize(
    ("mlp", "reason"),
    [
        (partial(Mlp, 16, 32, act_layer=nn.SiLU), "its activation is SiLU, not GELU"),
        (partial(GluMlp, 16, 32), "its activation is Sigmoid, not GELU or SiLU"),
        (partial(SwiGLU, 16, 32, norm_layer=nn.LayerNorm), "a norm lies between its layers"),
        (partial(Mlp, 16, 32, drop=0.1), "dropout lies between its layers"),
    ],
)
def test_what_cannot_be_fused_is_left_and_said(mlp, reason: str) -> None:
    model = Model(mlp())
    fuse_mlps(model, KernelsConfig(), CPU)
    assert not isinstance(model.blocks[0].mlp, FusedMlp)
    with pytest.raises(UserError, match=reason):
        fused(mlp(), save="fast", backend="eager")
