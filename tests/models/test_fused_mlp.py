"""What becomes of a model's MLPs, by config and device."""

import os
import subprocess
import sys

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from launching import SECONDS
from scalevit.config.model import KernelsConfig
from scalevit.errors import SettingError
from scalevit.models.fused_mlp import fuse_mlps

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(16, 32)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block())


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
