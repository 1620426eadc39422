"""One set of weights at several widths: each MLP uses its first hidden units only.

Knows MLPs and how the fused operator narrows them. Must not know how the widths are trained.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from scalevit.config.model import KernelsConfig, ModelConfig
from scalevit.errors import SettingError, UserError
from scalevit.kernels.support import WIDTH_MULTIPLE
from scalevit.models.build import build_model, create_unreduced
from scalevit.models.fused_mlp import FusedMlp, fused
from scalevit.models.mlps import ReplacedMlp, mlp_places, mlp_views, transformer_blocks
from scalevit.models.reductions.apply import parse_reduction
from scalevit.models.reductions.base import Reduction, fraction_of


def make_nested(model: nn.Module, kernels: KernelsConfig) -> None:
    """Replaces the MLPs of a model that are not fused yet, in place; blocks that share one share the new module.

    They compute what they did, by the fused operator's eager backend, until `NestedWidths` narrows them.

    Args:
        model: reduced, perhaps with fused MLPs.
        kernels: how its MLPs are computed.

    Raises:
        UserError: an MLP cannot be narrowed.
    """
    replaced: dict[nn.Module, FusedMlp] = {}
    for place in [place for block in transformer_blocks(model) for place in mlp_places(block)]:
        mlp = place.module
        if not isinstance(mlp, ReplacedMlp):
            if mlp not in replaced:
                replaced[mlp] = fused(mlp, save=kernels.save, backend="eager")
            place.put(replaced[mlp])


class NestedWidths:
    """The widths of a model after `make_nested`, as fractions of the hidden units of each MLP."""

    def __init__(self, model: nn.Module):
        """
        Raises:
            UserError: the model has no MLP that can be narrowed.
        """
        self._mlps = [module for module in model.modules() if isinstance(module, FusedMlp)]
        if not self._mlps:
            raise UserError(f"model {type(model).__name__} has no MLP that can be narrowed")

    def check(self, widths: Sequence[float]) -> None:
        """Finds widths that the kernels cannot compute.

        Raises:
            SettingError: "widths" has one that is no multiple of 16 units; names the nearest that are.
        """
        for hidden in sorted({mlp.hidden for mlp in self._mlps}):
            for width in widths:
                units = units_of(width, hidden)
                if units != hidden and (units % WIDTH_MULTIPLE or not units):
                    below = units // WIDTH_MULTIPLE * WIDTH_MULTIPLE
                    near = [n for n in (below, below + WIDTH_MULTIPLE) if 0 < n <= hidden]
                    options = " or ".join(f"{_fraction(n, hidden):g} ({n} units)" for n in near)
                    raise SettingError(
                        "widths",
                        list(widths),
                        f"{width:g} of {hidden} hidden units are {units}, not a multiple of {WIDTH_MULTIPLE}: use "
                        f"{options or '1.0'}",
                    )

    def set(self, width: float | None) -> None:
        """Has every MLP use this fraction of its hidden units from its next forward on; None or 1: all."""
        for mlp in self._mlps:
            mlp.width = None if width is None or width == 1.0 else units_of(width, mlp.hidden)

    @contextmanager
    def at(self, width: float | None) -> Iterator[None]:
        """Runs a block at a width, whatever it was before; afterwards it is that again."""
        before = [mlp.width for mlp in self._mlps]
        self.set(width)
        try:
            yield
        finally:
            for mlp, own in zip(self._mlps, before, strict=True):
                mlp.width = own


def units_of(width: float, hidden: int) -> int:
    """The number of hidden units in a fraction, rounded down as ShallowMLP does."""
    return int(width * hidden)


def _fraction(units: int, hidden: int) -> float:
    """A fraction of few decimals, four or more, that is this number of units."""
    rounded = (math.ceil(units / hidden * 10**decimals) / 10**decimals for decimals in range(4, 16))
    return next((fraction for fraction in rounded if units_of(fraction, hidden) == units), fraction_of(units, hidden))


def cut_to_width(
    model: nn.Module, width: float, *, description: ModelConfig, reduction: Reduction
) -> tuple[ModelConfig, Reduction]:
    """Removes all hidden units beyond a width, in place.

    Args:
        model: with PyTorch's own MLPs, reduced, with weights that were trained at this width too.
        width: fraction of the hidden units of each MLP.
        description: of the model, as it was built.
        reduction: that was applied.

    Returns:
        The settings that build the model as it is now: with a lower `mlp_ratio`, of timm's factory or, where the
        reduction sets that, of the reduction.

    Raises:
        SettingError: the "width" leaves no units, or is above 1.
        UserError: an MLP cannot be narrowed.
    """
    views = list({view.module: view for own in mlp_views(model) for view in own}.values())
    if not 0.0 < width <= 1.0 or any(units_of(width, view.hidden) < 1 for view in views):
        raise SettingError("width", width, "must leave hidden units, and be at most 1")
    for view in views:
        view.narrow(units_of(width, view.hidden))
    wanted = _shapes(model)
    for settings in _narrower(description.without_weights(), reduction, width):
        if _shapes(build_model(*settings, seed=0, device="meta")) == wanted:
            return settings
    raise UserError(f"model {description.name}: no settings build it at width {width:g}")


def _narrower(model: ModelConfig, reduction: Reduction, width: float) -> Iterator[tuple[ModelConfig, Reduction]]:
    """Settings that may build a model at a width."""
    with torch.device("meta"):
        unreduced = mlp_views(create_unreduced(model, reduction))[0][0]
    units = units_of(width, unreduced.hidden)
    for features in (units, 2 * units):  # some models count the gate of a packed MLP too
        ratio = fraction_of(features, unreduced.width)
        if "mlp_ratio" in reduction.factory_arguments():
            yield model, reduction.model_copy(update={"mlp_ratio": ratio})
        else:
            yield model.model_copy(update={"kwargs": {**model.kwargs, "mlp_ratio": ratio}}), reduction
    if not reduction.changes_model:  # where the ratio narrows an MLP outside of the blocks too
        yield model, parse_reduction({"strategy": "shallow", "keep": width})


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}
