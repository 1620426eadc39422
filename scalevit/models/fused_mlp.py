"""The module through which a ViT's MLPs reach the fused kernels.

Knows timm's `Mlp` and the face of `scalevit.kernels`. Must not know engines or reductions.
"""

import torch
from timm.layers import GELU, GELUTanh, Mlp
from torch import Tensor, nn

from scalevit.config.model import KernelsConfig
from scalevit.errors import SettingError, UserError
from scalevit.kernels import fused_mlp, unsupported_reason
from scalevit.models.mlps import ReplacedMlp, mlp_places, transformer_blocks


class FusedMlp(ReplacedMlp):
    """timm's `Mlp` computed by `scalevit.kernels.fused_mlp`; takes over its layers and parameter names.

    Its forward reads the parameters of fc1 and fc2 without calling these modules.
    """

    def __init__(self, mlp: Mlp, *, activation: str, save: str, backend: str):
        super().__init__()
        self.fc1 = mlp.fc1
        self.fc2 = mlp.fc2
        self.drop2 = mlp.drop2
        self.activation = activation
        self.save = save
        self.backend = backend
        self.width: int | None = None
        """Hidden units in use, the first ones; None: all. Changed between forward passes (`models.nested`)."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D_out)."""
        y = fused_mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            width=self.width,
            activation=self.activation,
            save=self.save,
            backend=self.backend,
        )
        return self.drop2(y)


def fuse_mlps(model: nn.Module, kernels: KernelsConfig, device: torch.device) -> nn.Module:
    """Replaces every MLP by a `FusedMlp`, in place; blocks that shared an MLP share the new module.

    An MLP that the kernels cannot compute (an activation other than GELU, a norm or dropout between its layers) is
    left as it is; `describe_mlps` says why.

    Args:
        model: reduced already, if it is to be.
        device: where the model will run.

    Raises:
        SettingError: such an MLP, or a device that cannot run the kernels, where `kernels.mlp` is "triton".
    """
    if kernels.mlp == "eager":
        return model
    obstacle = unsupported_reason(device)
    if kernels.mlp == "triton" and obstacle:
        raise SettingError("kernels.mlp", kernels.mlp, f"{obstacle}: use 'auto' or 'eager'")
    fused: dict[nn.Module, nn.Module] = {}
    for place in [place for block in transformer_blocks(model) for place in mlp_places(block)]:
        mlp = place.module
        if isinstance(mlp, Mlp):
            if mlp not in fused:
                fused[mlp] = _fuse(mlp, kernels)
            place.put(fused[mlp])
    return model


def describe_mlps(model: nn.Module, kernels: KernelsConfig, device: torch.device) -> str:
    """How a model's MLPs are computed, in a few words, for the banner of a run.

    Args:
        model: after `fuse_mlps`, perhaps inside an engine.
        device: where it runs.
    """
    if kernels.mlp == "eager":
        return "eager PyTorch"
    if device.type == "cpu" and unsupported_reason(device):
        return "eager PyTorch: the kernels need a GPU"
    mlps = [module for module in model.modules() if isinstance(module, Mlp)]
    if obstacle := unsupported_reason(device) or (mlps and _obstacle(mlps[0])):
        return f"eager PyTorch: {obstacle}"
    return f"fused Triton kernels, save={kernels.save}"


def _fuse(mlp: Mlp, kernels: KernelsConfig) -> nn.Module:
    obstacle = _obstacle(mlp)
    if obstacle is None:
        return fused(mlp, save=kernels.save, backend=kernels.mlp)
    if kernels.mlp == "triton":
        raise SettingError("kernels.mlp", kernels.mlp, f"this model's MLP cannot be fused: {obstacle}")
    return mlp


def fused(mlp: Mlp, *, save: str, backend: str) -> FusedMlp:
    """The module in an MLP's place, whatever the device: with the backend "eager" it runs on all.

    Raises:
        UserError: the fused operator cannot compute this MLP.
    """
    activation = _activation(mlp.act)
    if (obstacle := _obstacle(mlp)) or activation is None:
        raise UserError(f"model: its MLPs cannot be computed by the fused operator: {obstacle}")
    return FusedMlp(mlp, activation=activation, save=save, backend=backend)


def _obstacle(mlp: Mlp) -> str | None:
    """Why the kernels cannot compute an MLP; None if they can."""
    if _activation(mlp.act) is None:
        return f"its activation is {type(mlp.act).__name__}, not GELU"
    if not isinstance(mlp.norm, nn.Identity):
        return "a norm lies between its layers"
    return "dropout lies between its layers" if mlp.drop1.p > 0 else None


def _activation(act: nn.Module) -> str | None:
    """The kernels' name of an activation module, or None."""
    if isinstance(act, GELUTanh) or (isinstance(act, nn.GELU) and act.approximate == "tanh"):
        return "gelu_tanh"
    return "gelu" if isinstance(act, nn.GELU | GELU) else None
