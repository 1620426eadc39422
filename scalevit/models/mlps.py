"""Finds the transformer blocks of a timm model and their MLPs, and changes MLPs in place.

Knows layers, whatever class of model they are in. Must not know which reduction asks for a change, or the kernels.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import GluMlp, Mlp, RelPosMlp, SwiGLU
from torch import Tensor, nn

from scalevit.errors import UserError

_KINDS = (Mlp, GluMlp, SwiGLU)
# Modules around an MLP that only its branch of the residual stream uses, in every timm block that has them.
_BRANCH = ("norm2", "ls2", "drop_path2")


class _HiddenRows(NamedTuple):
    """Rows of a layer that compute the hidden units: unit i is row `first + i`."""

    layer: Any
    first: int
    gate: bool
    """Whether an activation of them multiplies the other rows."""


class MlpView:
    """One face for the MLPs that can be reduced.

    Plain: timm's `Mlp` (fc1, activation, fc2). Gated: `GluMlp`, also known as `SwiGLUPacked` (gate and value packed in
    fc1), and `SwiGLU` (fc1_g, fc1_x). A hidden unit of a gated MLP is a row of the gate with the same row of the value.
    """

    def __init__(self, module: Mlp | GluMlp | SwiGLU):
        self.module: Any = module  # torch types a layer's attributes as tensors or modules

    @property
    def _rows(self) -> tuple[_HiddenRows, ...]:
        module = self.module
        if isinstance(module, SwiGLU):
            return _HiddenRows(module.fc1_g, 0, True), _HiddenRows(module.fc1_x, 0, False)
        if isinstance(module, GluMlp):
            half = self.hidden
            return _HiddenRows(module.fc1, 0, not module.gate_last), _HiddenRows(module.fc1, half, module.gate_last)
        return (_HiddenRows(module.fc1, 0, False),)

    @property
    def output(self) -> nn.Linear:
        """The layer from the hidden units to the residual stream; its input is what the hidden units compute."""
        return self.module.fc2

    @property
    def width(self) -> int:
        """Features of the input."""
        return self._rows[0].layer.in_features

    @property
    def hidden(self) -> int:
        """Number of hidden units."""
        return self.output.in_features

    @property
    def gated(self) -> bool:
        """Whether the hidden units have a gate."""
        return not isinstance(self.module, Mlp)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What two MLPs must have in common so that one can take the place of the other."""
        return type(self.module), {name: tuple(value.shape) for name, value in self.module.named_parameters()}

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiplies the rows of fc1, their biases and `fc2.weight` by a factor; `fc2.bias` is unchanged.

        Of a gated MLP the value is scaled and the gate is not: without a norm between the layers, its output without
        `fc2.bias` is then exactly factor^2 times what it was.
        """
        for layer, first, gate in self._rows:
            if not gate:
                for parameter in (layer.weight, layer.bias):
                    if parameter is not None:
                        parameter[first : first + self.hidden].mul_(factor)
        self.output.weight.mul_(factor)

    @torch.no_grad()
    def importance(self) -> Tensor:
        """Of each hidden unit (hidden,), from the weights only: the product of the norms of its rows and fc2 column."""
        result = self.output.weight.norm(dim=0)
        for layer, first, _ in self._rows:
            result = result * layer.weight[first : first + self.hidden].norm(dim=1)
        return result

    @torch.no_grad()
    def unit_vectors(self) -> Tensor:
        """(hidden, features): of each hidden unit, its rows with their biases, then its column of fc2."""
        parts = []
        for layer, first, _ in self._rows:
            rows = slice(first, first + self.hidden)
            parts.append(layer.weight[rows])
            if layer.bias is not None:
                parts.append(layer.bias[rows, None])
        return torch.cat([*parts, self.output.weight.T], dim=1)

    def narrow(self, kept: int, *, select_units: str = "first") -> None:
        """Removes all but `kept` hidden units.

        Args:
            select_units: "first" keeps the first units; "importance" those of the largest `importance`, in their old
                order.

        Raises:
            UserError: as `keep`.
        """
        if select_units == "importance":
            units = self.importance().topk(kept).indices.sort().values
        else:
            units = torch.arange(kept, device=self.output.weight.device)
        self.keep(units)

    @torch.no_grad()
    def keep(self, units: Tensor) -> None:
        """Removes all hidden units but some, with their part of a norm between the layers.

        Args:
            units: (kept,) int64, numbers of the units, in their new order.

        Raises:
            UserError: a module between the layers depends on the number of units in a way that is not known here.
        """
        hidden, kept = self.hidden, len(units)
        self._narrow_norm(units)
        by_layer: dict[nn.Linear, list[Tensor]] = {}
        for layer, first, _ in self._rows:
            by_layer.setdefault(layer, []).append(first + units)
        for layer, rows in by_layer.items():
            layer.weight = _selected(layer.weight, 0, torch.cat(rows))
            if layer.bias is not None:
                layer.bias = _selected(layer.bias, 0, torch.cat(rows))
            layer.out_features = layer.out_features // hidden * kept
        self.output.weight = _selected(self.output.weight, 1, units)
        self.output.in_features = kept

    def _narrow_norm(self, units: Tensor) -> None:
        norm = self.module.norm
        if isinstance(norm, nn.Identity):
            return
        if tuple(getattr(norm, "normalized_shape", ())) != (self.hidden,):
            raise UserError(f"model: an MLP with a {type(norm).__name__} between its layers cannot be narrowed")
        for name, parameter in list(norm.named_parameters()):
            setattr(norm, name, _selected(parameter, 0, units))
        norm.normalized_shape = (len(units),)


def _selected(parameter: Any, dim: int, units: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.index_select(dim, units), requires_grad=parameter.requires_grad)


class ReplacedMlp(nn.Module):
    """A module of ours in the place of a timm MLP."""


class NoMlp(ReplacedMlp):
    """In the place of a removed MLP: adds nothing to the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> a zero, which broadcasts."""
        return x.new_zeros(())


@dataclass(frozen=True)
class MlpPlace:
    """Where a block has an MLP: an attribute of one of its modules."""

    owner: nn.Module
    """The block, or a module inside it."""
    name: str

    @property
    def module(self) -> Any:
        """What is there: an MLP of timm, or a `ReplacedMlp`."""
        return getattr(self.owner, self.name)

    def put(self, module: nn.Module) -> None:
        """Replaces what is there."""
        setattr(self.owner, self.name, module)

    def remove(self) -> None:
        """Removes the MLP with the norm, layer scale and drop-path of its branch."""
        self.put(NoMlp())
        # In timm's `ParallelThingsBlock` the owner is the branch: a sequence of norm, MLP, layer scale and drop-path.
        branch = [name for name, _ in self.owner.named_children()] if isinstance(self.owner, nn.Sequential) else _BRANCH
        for name in branch:
            if name != self.name and hasattr(self.owner, name):
                setattr(self.owner, name, nn.Identity())


def transformer_blocks(model: nn.Module) -> list[Any]:
    """The repeated blocks of a model, in the order of its forward: what engines wrap and recompute.

    They are the elements of its container `blocks` (ViT), or those of its stages (Swin), which may hold further
    containers (Twins). Empty for models without, as some convolutional networks.
    """
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList):
        nested = [list(child) if isinstance(child, nn.ModuleList) else [child] for child in blocks]
        return [block for children in nested for block in children]
    return [block for child in model.children() for block in transformer_blocks(child)]


def mlp_places(block: nn.Module) -> list[MlpPlace]:
    """Where a block has MLPs that are known here, whatever became of them: one place in most blocks."""
    places: list[MlpPlace] = []
    for name, child in block.named_children():
        if (isinstance(child, _KINDS) and _is_linear(child)) or isinstance(child, ReplacedMlp):
            places.append(MlpPlace(block, name))
        elif not isinstance(child, RelPosMlp):  # whose MLP computes position biases
            places += mlp_places(child)
    return places


def mlp_views(model: nn.Module) -> list[list[MlpView]]:
    """The MLPs of each block, none where they were removed; blocks that share a module have views of their own.

    Before fusing.

    Raises:
        UserError: the model has no blocks, or one has no MLP that can be reduced.
    """
    blocks = transformer_blocks(model)
    if not blocks:
        raise UserError(f"model {type(model).__name__} cannot be reduced: it has no transformer blocks")
    views: list[list[MlpView]] = []
    for index, block in enumerate(blocks):
        places = mlp_places(block)
        if not places:
            raise UserError(
                f"model {type(model).__name__} cannot be reduced: block {index} ({type(block).__name__}) has "
                f"{_found_instead(block)}, needs timm's Mlp, GluMlp or SwiGLU"
            )
        views.append([MlpView(place.module) for place in places if isinstance(place.module, _KINDS)])
    return views


def _is_linear(mlp: Any) -> bool:
    return all(isinstance(layer, nn.Linear) for name, layer in mlp.named_children() if name.startswith("fc"))


def _found_instead(block: nn.Module) -> str:
    for name, child in block.named_modules():
        if name.rpartition(".")[2] in ("mlp", "ffn"):
            layers = " of convolutions" if isinstance(child, _KINDS) else ""
            return f"a {type(child).__name__}{layers} as MLP"
    return "no MLP of its own"
