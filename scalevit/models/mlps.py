"""Finds the transformer blocks of a timm model and their MLPs, and changes MLPs in place.

Knows layers. Must not know which reduction asks for a change, or the kernels.
"""

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from scalevit.errors import UserError
from scalevit.models.families import family_of


class MlpView:
    """One face for the MLPs that can be reduced; today timm's `Mlp` (fc1, activation, fc2).

    Shapes: fc1 (hidden, width), fc2 (width_out, hidden).
    """

    def __init__(self, module: Mlp):
        self.module: Any = module  # torch types a layer's attributes as tensors or modules

    @property
    def width(self) -> int:
        """Features of the input."""
        return self.module.fc1.in_features

    @property
    def hidden(self) -> int:
        """Number of hidden units."""
        return self.module.fc1.out_features

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiplies `fc1.weight`, `fc1.bias` and `fc2.weight` by a factor; `fc2.bias` is unchanged."""
        for parameter in (self.module.fc1.weight, self.module.fc1.bias, self.module.fc2.weight):
            if parameter is not None:
                parameter.mul_(factor)

    @torch.no_grad()
    def narrow(self, kept: int, *, select_units: str = "first") -> None:
        """Removes all but `kept` hidden units.

        Args:
            select_units: "first" keeps the first units; "importance" those with the largest product of the norms of
                their fc1 row and fc2 column, in their old order.

        Raises:
            UserError: a norm lies between the two layers.
        """
        fc1, fc2 = self.module.fc1, self.module.fc2
        if not isinstance(self.module.norm, nn.Identity):
            raise UserError("model: an MLP with a norm between fc1 and fc2 cannot be narrowed")
        if select_units == "importance":
            importance = fc1.weight.norm(dim=1) * fc2.weight.norm(dim=0)
            units = importance.topk(kept).indices.sort().values
        else:
            units = torch.arange(kept, device=fc1.weight.device)
        fc1.weight = _selected(fc1.weight, 0, units)
        if fc1.bias is not None:
            fc1.bias = _selected(fc1.bias, 0, units)
        fc2.weight = _selected(fc2.weight, 1, units)
        fc1.out_features = fc2.in_features = kept


def _selected(parameter: nn.Parameter, dim: int, units: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.index_select(dim, units), requires_grad=parameter.requires_grad)


class NoMlp(nn.Module):
    """In the place of a removed MLP: adds nothing to the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> a zero, which broadcasts."""
        return x.new_zeros(())


def transformer_blocks(model: nn.Module) -> list[Any]:
    """The transformer blocks of a model, whatever became of their MLPs: what engines wrap and recompute.

    Raises:
        UserError: the model is of no known family, or has no blocks.
    """
    blocks = family_of(model).blocks(model)
    if not blocks:
        raise UserError(f"model {type(model).__name__} has no transformer blocks")
    return blocks


def mlp_views(model: nn.Module) -> list[MlpView | None]:
    """Each block's MLP, None for a block without; blocks that share a module have a view each. Before fusing.

    Raises:
        UserError: as `transformer_blocks`, or a block carries an MLP of a kind that is not supported.
    """
    views: list[MlpView | None] = []
    for index, block in enumerate(transformer_blocks(model)):
        mlp = getattr(block, "mlp", None)
        if isinstance(mlp, NoMlp):
            views.append(None)
            continue
        if not isinstance(mlp, Mlp) or not isinstance(mlp.fc1, nn.Linear):
            found = "no mlp" if mlp is None else f"a {type(mlp).__name__}"
            raise UserError(
                f"model {type(model).__name__} is not supported: blocks.{index} has {found}, expected timm's Mlp "
                "(fc1, act, fc2)"
            )
        views.append(MlpView(mlp))
    return views


def remove_mlp(model: nn.Module, block: Any) -> None:
    """Removes a block's MLP with the norm, layer scale and drop-path around it, in place."""
    block.mlp = NoMlp()
    for name in family_of(model).mlp_branch:
        if hasattr(block, name):
            setattr(block, name, nn.Identity())
