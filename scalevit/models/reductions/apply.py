"""Applies any reduction to a model: the same code for whole models and for one MLP at a time (`meta_init`).

Knows the methods of `Reduction`, and no reduction by name.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from scalevit.config.base import parse_section
from scalevit.errors import SettingError, UserError, nearest_hint
from scalevit.models import reductions
from scalevit.models.mlps import MlpView, mlp_places, mlp_views, transformer_blocks
from scalevit.models.reductions.base import Reduction


def reduce_model(model: nn.Module, reduction: Reduction) -> nn.Module:
    """Applies a reduction to a built and initialised model, in place.

    `reduction.factory_arguments` must have been passed to the model's factory already.

    Args:
        model: a timm transformer whose blocks have timm's `Mlp`, `GluMlp` or `SwiGLU`.

    Returns:
        The same model.

    Raises:
        UserError: the model has no such blocks, or blocks that shall share an MLP have different ones.
        SettingError: the reduction does not fit the model. The model may then be partly reduced.
    """
    if not reduction.changes_model:
        return model
    views = mlp_views(model)
    places = [mlp_places(block) for block in transformer_blocks(model)]
    sources = mlp_sources(reduction, len(places))
    for block, source in enumerate(sources):
        if source is not None:
            _check_same_mlps(model, views, block, source)
    for block, own in enumerate(views):
        for view in own if sources[block] == block else []:
            reduction.transform(view, block, len(places))
    for block, source in enumerate(sources):
        for index, place in enumerate(places[block]):
            if source is None:
                place.remove()
            elif source != block:
                # The module is shared, never only its parameters: engines wrap modules.
                place.put(places[source][index].module)
    return model


def _check_same_mlps(model: nn.Module, views: list[list[MlpView]], block: int, source: int) -> None:
    """Two blocks can share their MLPs if these are of the same kind and shapes."""
    here, there = ([view.shapes for view in views[index]] for index in (block, source))
    if here != there:
        shapes = [f"{view.width} x {view.hidden}" for index in (source, block) for view in views[index]]
        raise UserError(
            f"model {type(model).__name__}: blocks {source} and {block} cannot share their MLPs, whose shapes are "
            f"{' and '.join(dict.fromkeys(shapes))}: name groups of equal blocks"
        )


def mlp_sources(reduction: Reduction, depth: int) -> list[int | None]:
    """For each block, the block whose MLP it uses, or None.

    Raises:
        SettingError: the reduction does not fit a model of this depth.
    """
    sources = [reduction.source(block, depth) for block in range(depth)]
    for block, source in enumerate(sources):
        assert source is None or (0 <= source <= block and sources[source] == source), (
            f"{type(reduction).__name__}.source({block}, {depth}) is {source}: it must be the block itself, an earlier "
            "block that uses its own MLP, or None"
        )
    return sources


def factory_arguments(reduction: Reduction, given: Mapping[str, Any]) -> dict[str, Any]:
    """The user's arguments of the timm factory with those that the reduction adds.

    Raises:
        SettingError: both set the same argument.
    """
    added = reduction.factory_arguments()
    for key in added.keys() & given.keys():
        raise SettingError(
            key,
            given[key],
            f"reduction {reduction.strategy!r} sets the same argument to {added[key]}: keep one of them",
        )
    return {**given, **added}


def parse_reduction(settings: Mapping[str, Any]) -> Reduction:
    """The reduction with these settings, of which `strategy` names the kind.

    Raises:
        SettingError: an unknown strategy or setting, or an impossible value.
    """
    kinds = {part.kind(): part for part in reductions.REDUCTIONS}
    strategy = settings.get("strategy")
    if strategy not in kinds:
        hint = nearest_hint(str(strategy), kinds)
        raise SettingError("strategy", strategy, f"must be one of {', '.join(kinds)}{hint}")
    return parse_section(kinds[strategy], settings)
