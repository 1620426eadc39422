"""The modules through which a ViT's MLPs reach the fused kernels.

Knows timm's MLPs and the face of `scalevit.kernels`. Must not know engines or reductions.
"""

from typing import Any

import torch
from timm.layers import GELU, GELUTanh, GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from scalevit.config.model import KernelsConfig
from scalevit.errors import SettingError, UserError
from scalevit.kernels import fused_gated_mlp, fused_mlp, fused_packed_gated_mlp, unsupported_reason
from scalevit.models.mlps import ReplacedMlp, mlp_places, transformer_blocks


class FusedMlp(ReplacedMlp):
    """timm's `Mlp` computed by `scalevit.kernels.fused_mlp`; takes over its layers and parameter names.

    Its forward reads the parameters of the layers without calling these modules.
    """

    fc1: nn.Linear
    fc2: nn.Linear
    drop2: nn.Module

    def __init__(self, mlp: Mlp | GluMlp | SwiGLU, *, activation: str, save: str, backend: str):
        super().__init__()
        for name, layer in mlp.named_children():
            if isinstance(layer, nn.Linear) or name == "drop2":
                self.add_module(name, layer)
        self.activation = activation
        self.save = save
        self.backend = backend
        self.width: int | None = None
        """Hidden units in use, the first ones; None: all. Changed between forward passes (`models.nested`)."""

    @property
    def hidden(self) -> int:
        """Number of hidden units."""
        return self.fc2.in_features

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D_out)."""
        options = {"width": self.width, "activation": self.activation, "save": self.save, "backend": self.backend}
        return self.drop2(self._compute(x, options))

    def _compute(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        return fused_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, **options)


class FusedPackedGatedMlp(FusedMlp):
    """timm's `GluMlp`, by `fused_packed_gated_mlp`."""

    def __init__(self, mlp: GluMlp, *, activation: str, save: str, backend: str):
        super().__init__(mlp, activation=activation, save=save, backend=backend)
        self.gate_last = mlp.gate_last

    def _compute(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        return fused_packed_gated_mlp(
            x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, gate_last=self.gate_last, **options
        )


class FusedGatedMlp(FusedMlp):
    """timm's `SwiGLU`, by `fused_gated_mlp`."""

    fc1_g: nn.Linear
    fc1_x: nn.Linear

    def _compute(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        gate, value, fc2 = self.fc1_g, self.fc1_x, self.fc2
        return fused_gated_mlp(x, gate.weight, gate.bias, value.weight, value.bias, fc2.weight, fc2.bias, **options)


_FUSED: dict[type[nn.Module], type[FusedMlp]] = {
    Mlp: FusedMlp,
    GluMlp: FusedPackedGatedMlp,
    SwiGLU: FusedGatedMlp,
}


def fuse_mlps(model: nn.Module, kernels: KernelsConfig, device: torch.device) -> nn.Module:
    """Replaces every MLP by a `FusedMlp`, in place; blocks that shared an MLP share the new module.

    An MLP that the kernels cannot compute (another activation than GELU, or than SiLU and GELU of a gate; a norm or
    dropout between its layers) is left as it is; `describe_mlps` says why.

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
        if type(mlp) in _FUSED:
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
    mlps = [place.module for block in transformer_blocks(model) for place in mlp_places(block)]
    left = [mlp for mlp in mlps if not isinstance(mlp, ReplacedMlp)]
    if not mlps:
        return "eager PyTorch: this model has none that the kernels know"
    if obstacle := unsupported_reason(device) or (left and _obstacle(left[0])):
        return f"eager PyTorch: {obstacle}"
    return f"fused Triton kernels, save={kernels.save}"


def _fuse(mlp: Any, kernels: KernelsConfig) -> nn.Module:
    obstacle = _obstacle(mlp)
    if obstacle is None:
        return fused(mlp, save=kernels.save, backend=kernels.mlp)
    if kernels.mlp == "triton":
        raise SettingError("kernels.mlp", kernels.mlp, f"this model's MLP cannot be fused: {obstacle}")
    return mlp


def fused(mlp: Mlp | GluMlp | SwiGLU, *, save: str, backend: str) -> FusedMlp:
    """The module in an MLP's place, whatever the device: with the backend "eager" it runs on all.

    Raises:
        UserError: the fused operator cannot compute this MLP.
    """
    activation = _activation(mlp)
    if (obstacle := _obstacle(mlp)) or activation is None:
        raise UserError(f"model: its MLPs cannot be computed by the fused operator: {obstacle}")
    return _FUSED[type(mlp)](mlp, activation=activation, save=save, backend=backend)


def _obstacle(mlp: Any) -> str | None:
    """Why the kernels cannot compute an MLP; None if they can."""
    if _activation(mlp) is None:
        return f"its activation is {type(mlp.act).__name__}, not GELU{'' if type(mlp) is Mlp else ' or SiLU'}"
    if not isinstance(mlp.norm, nn.Identity):
        return "a norm lies between its layers"
    return "dropout lies between its layers" if mlp.drop1.p > 0 else None


def _activation(mlp: Any) -> str | None:
    """The kernels' name of an MLP's activation, or None."""
    act = mlp.act
    if type(mlp) is not Mlp and isinstance(act, nn.SiLU):
        return "silu"
    if isinstance(act, GELUTanh) or (isinstance(act, nn.GELU) and act.approximate == "tanh"):
        return "gelu_tanh"
    return "gelu" if isinstance(act, nn.GELU | GELU) else None
