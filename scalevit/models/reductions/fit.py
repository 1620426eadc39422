"""Reduces a trained model: shared and narrower MLPs from its weights, their last layers fitted to its outputs.

The reduced model's structure is given by an example, so that no reduction is known by name here. Closed forms only, in
fp64, the same numbers at every call. Must not know data: it is handed batches of images.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalevit.errors import UserError
from scalevit.models.mlps import MlpPlace, MlpView, NoMlp, mlp_places, mlp_views, transformer_blocks
from scalevit.models.reductions.least_squares import Moments, refitted
from scalevit.models.reductions.method import FitMethod, KeptUnits, SharedMlp
from scalevit.models.unit_matching import matching_units
from scalevit.models.watching import MlpUse, watch_mlps
from scalevit.tying import canonical_state

Batches = Callable[[], Iterable[Tensor]]
"""Calibration images on the model's device, (b, C, H, W), the same at every call."""


class _Shared(NamedTuple):
    """A reduced MLP with its uses: (block, index in the block), in the order of the forward."""

    uses: list[tuple[int, int]]
    example: MlpView
    """Of the shapes that it has to have."""


def reduce_trained(
    trained: nn.Module,
    example: nn.Module,
    method: FitMethod,
    batches: Batches,
    *,
    on_use: Callable[[int], None] = lambda block: None,
) -> nn.Module:
    """A reduced copy of a trained model.

    1. Blocks that share an MLP in the example get one (`FitMethod.shared`).
    2. MLPs that are narrower in the example keep some of their hidden units (`FitMethod.units`).
    3. fc2, weight and bias, of what has changed is fitted to the outputs of the trained model's MLPs for the same
       images, block by block from the first on: each use is seen with the inputs that it has behind the blocks that are
       reduced already. A shared MLP is fitted again at each use, to all uses until then.

    Args:
        trained: with timm's own MLPs, in evaluation mode; is left as it is.
        example: a model of the structure that is wanted, on any device; its values are not read.
        batches: calibration images. Not called where the method needs none.
        on_use: called before each fit, with its block.

    Raises:
        UserError: the trained model cannot become one of that structure.
    """
    reduced = copy.deepcopy(trained)
    shared = _share(reduced, example, method.shared)
    changed = [mlp for mlp in shared if _is_changed(trained, mlp)]
    _narrow(reduced, shared, method.units, batches)
    _check_structure(reduced, example)
    if method.refit:
        _refit(trained, reduced, changed, method.ridge, batches, on_use)
    return reduced


def _places(model: nn.Module) -> list[list[MlpPlace]]:
    return [mlp_places(block) for block in transformer_blocks(model)]


def _share(model: nn.Module, example: nn.Module, how: SharedMlp) -> list[_Shared]:
    """Gives the model the example's shared and removed MLPs, in place."""
    places, wanted = _places(model), _places(example)
    found: dict[nn.Module, _Shared] = {}
    owners: dict[Any, Any] = {}
    for block, (here, there) in enumerate(zip(places, wanted, strict=True)):
        for index, (place, goal) in enumerate(zip(here, there, strict=True)):
            shared: Any = goal.module
            if isinstance(shared, NoMlp):
                place.remove()
                continue
            if isinstance(place.module, NoMlp):
                raise UserError(f"the trained model has no MLP in block {block}, the reduced one has")
            if owners.setdefault(place.module, shared) is not shared:
                raise UserError(f"the trained model shares the MLP of block {block}, the reduced one does not")
            found.setdefault(shared, _Shared([], MlpView(shared))).uses.append((block, index))
    for mlp in found.values():
        own = [places[block][index] for block, index in mlp.uses]
        module = _shared_module([place.module for place in own], [block for block, _ in mlp.uses], how)
        for place in own:
            place.put(module)
    return list(found.values())


def _shared_module(modules: list[Any], blocks: list[int], how: SharedMlp) -> nn.Module:
    """One MLP for all of these, which it may change."""
    first, *_ = others = [MlpView(module) for module in modules]
    for block, other in zip(blocks, others, strict=True):
        if other.shapes != first.shapes:
            raise UserError(
                f"blocks {blocks[0]} and {block} cannot share an MLP: the trained ones have {first.hidden} and "
                f"{other.hidden} hidden units or differ in kind"
            )
    if how == "mean":
        for other in {id(view.module): view for view in others[1:] if view.module is not first.module}.values():
            other.keep(matching_units(first, other))
        with torch.no_grad():
            for values in zip(*(module.parameters() for module in modules), strict=True):
                values[0].copy_(torch.stack([value.double() for value in values]).mean(0))
    return modules[0]


def _is_changed(trained: nn.Module, mlp: _Shared) -> bool:
    views = mlp_views(trained)
    own = [views[block][index] for block, index in mlp.uses]
    return len({view.module for view in own}) > 1 or own[0].hidden != mlp.example.hidden


def _narrow(model: nn.Module, shared: list[_Shared], how: KeptUnits, batches: Batches) -> None:
    views = mlp_views(model)
    narrowed = []
    for mlp in shared:
        (block, index), wanted = mlp.uses[0], mlp.example.hidden
        view = views[block][index]
        if view.hidden < wanted:
            raise UserError(f"block {block}: an MLP of {view.hidden} hidden units cannot get {wanted}")
        if view.hidden > wanted:
            narrowed.append((view, wanted, mlp.uses))
    scores = _mean_activations(model, batches) if narrowed and how == "activations" else {}
    for view, wanted, uses in narrowed:
        if how == "activations":
            activations = torch.stack([scores[use] for use in uses]).sum(0)
            view.keep(_largest(activations * view.output.weight.norm(dim=0), wanted))
        else:
            view.narrow(wanted, select_units="importance" if how == "weights" else "first")


def _largest(scores: Tensor, count: int) -> Tensor:
    """The numbers of the largest, in ascending order."""
    return scores.topk(count).indices.sort().values


def _mean_activations(model: nn.Module, batches: Batches) -> dict[tuple[int, int], Tensor]:
    """By block and index, of each hidden unit: the mean of |activation| over all tokens, (hidden,) in fp64."""
    sums: dict[tuple[int, int], Tensor] = {}
    rows: dict[tuple[int, int], int] = {}

    def add(use: MlpUse) -> None:
        key = use.block, use.index
        sums[key] = sums.get(key, 0) + use.hidden.abs().sum(0, dtype=torch.float64)
        rows[key] = rows.get(key, 0) + len(use.hidden)

    for images in batches():
        watch_mlps(model, images, add)
    return {key: total / rows[key] for key, total in sums.items()}


def _check_structure(model: nn.Module, example: nn.Module) -> None:
    own, wanted = ({name: tuple(t.shape) for name, t in canonical_state(each).items()} for each in (model, example))
    for name in sorted(own.keys() | wanted.keys()):
        if own.get(name) != wanted.get(name):
            raise UserError(
                f"{name} is {own.get(name) or 'not'} in the trained model and {wanted.get(name) or 'not'} in the "
                "reduced one, which differ in more than their MLPs"
            )


def _refit(
    trained: nn.Module,
    reduced: nn.Module,
    changed: list[_Shared],
    ridge: float,
    batches: Batches,
    on_use: Callable[[int], None],
) -> None:
    views = mlp_views(reduced)
    owners = {use: number for number, mlp in enumerate(changed) for use in mlp.uses}
    moments: dict[int, Moments] = {}
    for use in sorted(owners):
        block, index = use
        on_use(block)
        here = _moments(trained, reduced, use, batches)
        owner = owners[use]
        moments[owner] = moments[owner] + here if owner in moments else here
        layer = views[block][index].output
        weight, bias = refitted(layer, moments[owner], ridge)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.copy_(bias)


def _moments(trained: nn.Module, reduced: nn.Module, use: tuple[int, int], batches: Batches) -> Moments:
    """Of one use over all images: the reduced model's hidden units against the trained model's outputs."""
    result: Moments | None = None
    for images in batches():
        kept: dict[str, Tensor] = {}

        def keep(name: str, values: Tensor, at: MlpUse, kept: dict[str, Tensor] = kept) -> None:
            if (at.block, at.index) == use:
                kept[name] = values

        watch_mlps(trained, images, lambda at: keep("output", at.output, at), last=use[0])
        watch_mlps(reduced, images, lambda at: keep("hidden", at.hidden, at), last=use[0])
        here = Moments.of(kept["hidden"], kept["output"])
        result = here if result is None else result + here
    assert result is not None, "there are no calibration images"
    return result
