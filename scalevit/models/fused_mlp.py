"""The module through which a ViT's MLPs reach the fused kernels."""

import warnings

import torch
from timm.layers import GELU, GELUTanh, Mlp
from torch import Tensor, nn

from scalevit.config.model import KernelsConfig
from scalevit.errors import UserError
from scalevit.kernels import fused_mlp, unsupported_reason
from scalevit.models.mlps import mlp_blocks


class FusedMlp(nn.Module):
    """timm's `Mlp` computed by `scalevit.kernels.fused_mlp`; takes over its layers and parameter names.

    Engines that gather parameters module by module must gather this module as one: its forward reads
    `fc1.weight` and `fc2.weight` without calling fc1 and fc2.
    """

    def __init__(self, mlp: Mlp, *, activation: str, save: str, backend: str):
        super().__init__()
        self.fc1 = mlp.fc1
        self.fc2 = mlp.fc2
        self.drop2 = mlp.drop2
        self.activation = activation
        self.save = save
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D_out)."""
        y = fused_mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            activation=self.activation,
            save=self.save,
            backend=self.backend,
        )
        return self.drop2(y)


def fuse_mlps(model: nn.Module, kernels: KernelsConfig, device: torch.device) -> nn.Module:
    """Puts a `FusedMlp` in the place of every MLP, in place; blocks that shared an MLP go on sharing one module.

    An MLP that the kernels cannot compute (an activation other than GELU, a norm or dropout in its middle) stays
    as it is, with one warning that says why.

    Raises:
        UserError: such an MLP, or a device that cannot run the kernels, where `kernels.mlp` is "triton".
    """
    if kernels.mlp == "eager":
        return model
    obstacle = unsupported_reason(device)
    if kernels.mlp == "triton" and obstacle:
        raise UserError(f"config: kernels.mlp = 'triton', but {obstacle}: use 'auto' or 'eager'")
    fused: dict[int, nn.Module] = {}
    for block in mlp_blocks(model):
        mlp = block.mlp
        if id(mlp) not in fused:
            fused[id(mlp)] = _fuse(mlp, kernels)
        block.mlp = fused[id(mlp)]
    return model


def _fuse(mlp: Mlp, kernels: KernelsConfig) -> nn.Module:
    activation = _activation(mlp.act)
    if activation is None:
        obstacle = f"its activation is {type(mlp.act).__name__}, not GELU"
    elif not isinstance(mlp.norm, nn.Identity):
        obstacle = "a norm lies between its layers"
    elif mlp.drop1.p > 0:
        obstacle = "dropout lies between its layers"
    else:
        return FusedMlp(mlp, activation=activation, save=kernels.save, backend=kernels.mlp)
    if kernels.mlp == "triton":
        raise UserError(f"config: kernels.mlp = 'triton', but this model's MLP cannot be fused: {obstacle}")
    warnings.warn(f"MLPs run in eager PyTorch: {obstacle}", stacklevel=2)
    return mlp


def _activation(act: nn.Module) -> str | None:
    """The kernels' name of an activation module, or None."""
    if isinstance(act, GELUTanh) or (isinstance(act, nn.GELU) and act.approximate == "tanh"):
        return "gelu_tanh"
    return "gelu" if isinstance(act, nn.GELU | GELU) else None
