"""Recognises weights of reduced models by their tensors, where a file does not say how its model was reduced.

A shared MLP is equal tensors of several blocks, a reduced width is another shape. So plain state dicts of reduced
models are neither scaled nor cut a second time. Knows names and shapes of MLPs; must not know a reduction by name.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from scalevit.errors import UserError
from scalevit.models import reductions
from scalevit.models.mlps import mlp_places, transformer_blocks
from scalevit.models.reductions.apply import reduce_model
from scalevit.models.reductions.base import BlockMlp, Reduction

Layout = tuple[BlockMlp, ...]


def are_reduced(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    reduction: Reduction,
    *,
    without_reduction: Callable[[], nn.Module],
    source: object,
    models: str,
) -> bool:
    """Whether weights are those of the model after the reduction, and not before it.

    Args:
        tensors: under the model's names.
        model: unreduced; it is left as it is.
        reduction: that is wanted.
        without_reduction: builds the model without the arguments of timm's factory that the reduction adds.
            Called with the meta device as default, and only where it adds some.
        source: of the weights, for messages.
        models: the end of messages about weights that do not fit.

    Raises:
        UserError: they are of a model that was reduced in another way.
        SettingError: the reduction does not fit the model.
    """
    prefixes = _prefixes(model)
    found = _layout(tensors, prefixes)
    reduced = _layout(_parameters(reduce_model(_without_values(model), reduction)), prefixes)
    if _is_of(found, reduced):
        return reduction.changes_model
    with torch.device("meta"):
        own = without_reduction() if reduction.factory_arguments() else model
    unreduced = _layout(_parameters(own), _prefixes(own))
    if any(here.width != own.width for here, own in zip(found, unreduced, strict=True)):
        return False  # another model or a part of one, which the comparison of names and shapes finds
    narrower = any(here.hidden < own.hidden for here, own in zip(found, unreduced, strict=True))
    shares = any(here.source != own.source for here, own in zip(found, unreduced, strict=True))
    if not narrower and (not shares or reduced == unreduced):
        return False  # unreduced, or each block gets its own copy of an MLP that it shared
    names = [in_short(part) for part in _recognised(found, unreduced)]
    hidden = [block.hidden for block in found]
    made_with = " or ".join(names) or f"of an unknown kind ({hidden} hidden units)"
    raise UserError(
        f"weights {source}: made with reduction {made_with}, which has another structure than {in_short(reduction)}"
        f"{models}"
    )


def shared_blocks(tensors: Mapping[str, Tensor], model: nn.Module) -> tuple[tuple[int, ...], ...]:
    """The groups of blocks whose MLPs are equal in the weights, though each block of the model has its own."""
    prefixes = _prefixes(model)
    groups: dict[int, list[int]] = {}
    for block, (found, own) in enumerate(
        zip(_layout(tensors, prefixes), _layout(_parameters(model), prefixes), strict=True)
    ):
        if found.source is not None and own.source == block:
            groups.setdefault(found.source, []).append(block)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def recognised(tensors: Mapping[str, Tensor], model: nn.Module) -> list[Reduction]:
    """The reductions that explain the MLPs of weights; none where they are unreduced, or of another model.

    Args:
        tensors: under the model's names.
        model: unreduced.
    """
    prefixes = _prefixes(model)
    found, unreduced = _layout(tensors, prefixes), _layout(_parameters(model), prefixes)
    if any(here.source is not None and here.width != own.width for here, own in zip(found, unreduced, strict=True)):
        return []
    return _recognised(found, unreduced)


def with_structure_of(
    trained: nn.Module, reduction: Reduction, example: nn.Module, unreduced: nn.Module
) -> Reduction | None:
    """A reduction that keeps what it leaves open of a trained model's: shared MLPs where it shares none, narrower ones
    where it narrows none.

    Args:
        example: a model of the reduction.
        unreduced: the same model without.

    Returns:
        The reduction itself where there is nothing to keep; None where no reduction has both.
    """
    have, wanted, plain = (_layout(_parameters(each), _prefixes(each)) for each in (trained, example, unreduced))
    shares = any(goal.source != own.source for goal, own in zip(wanted, plain, strict=True))
    narrows = any(goal.hidden != own.hidden for goal, own in zip(wanted, plain, strict=True))
    both = tuple(
        BlockMlp(goal.source if shares else now.source, goal.hidden if narrows else now.hidden, goal.width)
        for now, goal in zip(have, wanted, strict=True)
    )
    if both == wanted:
        return reduction
    return next(iter(_recognised(both, plain)), None)


def difference(tensors: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """In which way weights of a reduced model's width are not reduced as the model is.

    Args:
        tensors: under the model's names. A shared MLP may be listed for its first block only.

    Returns:
        None where they are reduced alike, or are of another model.
    """
    prefixes = _prefixes(model)
    found, own = _layout(tensors, prefixes), _layout(_parameters(model), prefixes)
    pairs = [(block, *pair) for block, pair in enumerate(zip(found, own, strict=True)) if pair[0].source is not None]
    if any(here.width != wanted.width for _, here, wanted in pairs):
        return None
    for block, here, wanted in pairs:
        if here.hidden != wanted.hidden:
            return f"the MLP of block {block} has {here.hidden} hidden units, this model's has {wanted.hidden}"
        if wanted.source != block and here.source != wanted.source:
            return f"blocks {wanted.source} and {block} have different MLPs, this model's share one"
    return None


def mlp_tensors(names: Set[str], model: nn.Module) -> set[str]:
    """Those of the names that are of MLPs in the model's blocks."""
    prefixes = tuple(prefix for own in _prefixes(model) for prefix in own)
    return {name for name in names if name.startswith(prefixes)}


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Also the further names of shared parameters."""
    return dict(model.named_parameters(remove_duplicate=False))


def _prefixes(model: nn.Module) -> list[list[str]]:
    """Of each block, where the names of its MLPs' parameters begin, e.g. ["blocks.0.mlp."], shared or not."""
    names = {module: name for name, module in model.named_modules()}
    found = []
    for block in transformer_blocks(model):
        inside = {module: name for name, module in block.named_modules()}
        found.append([f"{names[block]}.{inside[place.module]}." for place in mlp_places(block)])
    return found


def _layout(tensors: Mapping[str, Tensor], prefixes: Sequence[Sequence[str]]) -> Layout:
    """Of a block with several MLPs, which are reduced alike, the width and the hidden units of the first."""
    blocks: list[dict[str, Tensor]] = [{} for _ in prefixes]
    for block, own in enumerate(prefixes):
        for index, prefix in enumerate(own):
            for name in tensors:
                if name.startswith(prefix):
                    blocks[block][f"{index}.{name.removeprefix(prefix)}"] = tensors[name]
    result: list[BlockMlp] = []
    for block, mlp in enumerate(blocks):
        if "0.fc2.weight" not in mlp or mlp["0.fc2.weight"].ndim != 2:
            result.append(BlockMlp(None, 0, 0))
            continue
        firsts = (other for other in range(block) if result[other].source == other and _equal(mlp, blocks[other]))
        width, hidden = mlp["0.fc2.weight"].shape
        result.append(BlockMlp(next(firsts, block), hidden, width))
    return tuple(result)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two MLPs are the same tensors, or have the same values."""
    if one.keys() != other.keys():
        return False
    pairs = [(tensor, other[name]) for name, tensor in one.items()]
    if all(here is there for here, there in pairs):
        return True
    if any(here.shape != there.shape or here.device.type == "meta" for here, there in pairs):
        return False
    # A few values first, in which most MLPs differ.
    return all(torch.equal(here.flatten()[:16], there.flatten()[:16]) for here, there in pairs) and all(
        torch.equal(here, there) for here, there in pairs
    )


def _is_of(found: Layout, reduced: Layout) -> bool:
    """Whether weights have the layout of a reduced model. A shared MLP may be listed for its first block only."""
    return all(
        here == wanted or (here.source is None and wanted.source not in (None, block))
        for block, (here, wanted) in enumerate(zip(found, reduced, strict=True))
    )


def _without_values(model: nn.Module) -> nn.Module:
    """A copy on the meta device."""
    copies: dict[int, Tensor] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, copies)  # type: ignore[arg-type]  # typeshed wants values of any type


def _recognised(found: Layout, unreduced: Layout) -> list[Reduction]:
    parts = [part.recognise(found, unreduced) for part in reductions.REDUCTIONS]
    return [part for part in parts if part is not None]


def in_short(reduction: Reduction) -> str:
    """The settings of a reduction that are not its defaults, as JSON."""
    settings = reduction.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({"strategy": reduction.strategy, **settings})
