"""Matches the tensors of a weights file to a model, which is reduced first where they are reduced already.

So weights are never reduced twice. Knows names and shapes, not file formats.
"""

import contextlib
import io
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from scalevit.config.model import WeightsSet
from scalevit.errors import SettingError, UserError
from scalevit.models.families import classifier_names, converted
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions.apply import reduce_model
from scalevit.models.reductions.base import Reduction
from scalevit.models.weights.coverage import Coverage
from scalevit.models.weights.hub import Source
from scalevit.models.weights.read import Weights, read_weights
from scalevit.models.weights.structure import are_reduced, in_short, mlp_tensors, recognised, shared_blocks
from scalevit.tying import canonical_state, tied_names


class MatchedWeights(NamedTuple):
    """The tensors of a file for a model, by the model's canonical names, and what they cover."""

    tensors: dict[str, Tensor]
    coverage: Coverage


def load_initial_weights(
    model: nn.Module,
    source: Source,
    reduction: Reduction,
    *,
    without_reduction: Callable[[], nn.Module],
    weights_set: WeightsSet = "auto",
    need_classifier: bool = False,
) -> Coverage:
    """Loads weights into an unreduced model; reduces it first where the file's weights are reduced already.

    Args:
        source: a path, or an address as `hub.find_weights` takes it.
        without_reduction, weights_set, need_classifier: as for `match_weights`.

    Returns:
        What they cover. Where they are reduced already, the model is so now.

    Raises:
        UserError: as `match_weights`.
    """
    matched = match_weights(
        model,
        source,
        reduction,
        without_reduction=without_reduction,
        weights_set=weights_set,
        need_classifier=need_classifier,
    )
    with torch.no_grad():
        for name, tensor in canonical_state(model).items():
            if name in matched.tensors and tensor.device.type != "meta":
                tensor.copy_(matched.tensors[name])
    return matched.coverage


def match_weights(
    model: nn.Module,
    source: Source,
    reduction: Reduction,
    *,
    without_reduction: Callable[[], nn.Module],
    weights_set: WeightsSet = "auto",
    need_classifier: bool = False,
) -> MatchedWeights:
    """Reads weights for an unreduced model, and reduces it where they are reduced already.

    Weights of an unreduced model fit the model as it is; the caller then reduces it. Where a file does not say how its
    model was reduced, the tensors show it. Position embeddings and patch filters of another size are resampled, and
    patch filters adapted to another number of input channels, as timm does. A classifier that is missing, or for
    another number of classes, is left out: it keeps its initialisation.

    Args:
        source: a path, or an address as `hub.find_weights` takes it.
        without_reduction: builds the model without the arguments of timm's factory that the reduction adds, for
            messages. Called with the meta device as default.
        weights_set: which weights of a file with several sets.
        need_classifier: refuse weights whose classifier is missing or for another number of classes.

    Raises:
        UserError: the file's reduction is not the requested one, or its tensors do not fit.
        SettingError: the requested reduction does not fit the model.
    """
    weights = read_weights(source, weights_set=weights_set, model=model)
    tensors = fitted(weights.tensors, model)
    check_floating(tensors, model, source)
    models = differing_models(weights, tensors, model, reduced=True)
    if weights.described:
        already_reduced = weights.reduction is not None
        if weights.reduction is not None:
            _check_same_structure(weights.reduction, reduction, model, source, models)
    else:
        already_reduced = are_reduced(
            tensors, model, reduction, without_reduction=without_reduction, source=source, models=models
        )
    separated = () if weights.described or already_reduced else shared_blocks(tensors, model)
    if already_reduced:
        reduce_model(model, reduction)

    models = differing_models(weights, tensors, model)
    fresh = _fresh_names(tensors, model, source, models, need_classifier=need_classifier)
    if not already_reduced:
        _check_reducible(tensors, model, reduction, source)
    if problem := fitting_problem(tensors, model, fresh):
        raise UserError(f"weights {source}: {problem}{models}")
    taken = {name: tensors[name] for name in canonical_state(model) if name not in fresh}
    coverage = Coverage(
        tensors=len(taken),
        already_reduced=already_reduced,
        fresh=tuple(sorted(fresh)),
        resampled=tuple(name for name, tensor in taken.items() if _is_resampled(weights.tensors.get(name), tensor)),
        unused=_unused(weights.tensors, tensors),
        separated=separated,
        weights_set=weights.chosen,
    )
    return MatchedWeights(taken, coverage)


def reductions_of(source: Source, model: nn.Module, *, weights_set: WeightsSet = "auto") -> list[Reduction]:
    """The reduction of weights as their file says, else those that their tensors show; none of unreduced ones.

    Args:
        model: unreduced; it is left as it is.

    Raises:
        UserError: the file cannot be read.
    """
    weights = read_weights(source, weights_set=weights_set, model=model)
    if weights.described:
        return [] if weights.reduction is None else [weights.reduction]
    return recognised(fitted(weights.tensors, model), model)


def fitted(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of timm and of other programs under a model's names and in its sizes, as timm converts them.

    Position embeddings and patch filters of another size are resampled; filters for another number of input channels
    are adapted.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints what it finds missing in DINOv3's weights
            result = converted(tensors, model)
        return adapted_input(result, model)
    except Exception as error:  # of any kind: timm's conversions expect weights of their own models
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"weights: timm cannot convert them for a {type(model).__name__} ({reason})") from error


def adapted_input(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors with the filters of the first layer for the model's number of input channels."""
    result, own = dict(tensors), canonical_state(model)
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    first = config.get("first_conv") or ()
    for name in (f"{layer}.weight" for layer in ([first] if isinstance(first, str) else first)):
        given, wanted = result.get(name), own.get(name)
        if given is not None and wanted is not None and given.ndim == wanted.ndim == 4:
            result[name] = adapt_input_conv(wanted.shape[1], given, base_chans=given.shape[1])
    return result


def _fresh_names(
    tensors: Mapping[str, Tensor], model: nn.Module, source: Source, models: str, *, need_classifier: bool
) -> set[str]:
    """Names that keep their initialisation, see `match_weights`."""
    own, classifier = canonical_state(model), classifier_names(model)
    fresh = {name for name in classifier & tensors.keys() if tensors[name].shape[:1] != own[name].shape[:1]}
    if fresh and need_classifier:
        held, wanted = (each[min(fresh)].shape[0] for each in (tensors, own))
        raise UserError(
            f"weights {source}: have a classifier of {held} classes, but model.num_classes = {wanted}{models}"
        )
    if not need_classifier and not classifier & tensors.keys():  # of a backbone, such as DINOv2's
        return classifier
    return fresh


def check_floating(tensors: Mapping[str, Tensor], model: nn.Module, source: Source) -> None:
    """Refuses integers (of quantised weights, say) where the model has floating-point numbers: without their scales
    they are other numbers.

    Raises:
        UserError: names the first such tensor.
    """
    for name, own in model.state_dict().items():
        given = tensors.get(name)
        if given is not None and own.is_floating_point() and not given.is_floating_point():
            kinds = [str(each.dtype).removeprefix("torch.") for each in (given, own)]
            raise UserError(
                f"weights {source}: {name} has dtype {kinds[0]}, the model's is {kinds[1]}: save floating-point weights"
            )


def _check_same_structure(made_with: Reduction, wanted: Reduction, model: nn.Module, source: Any, models: str) -> None:
    """Two reductions are the same if their structure is, whatever acts at initialisation only."""
    depth = len(transformer_blocks(model))
    structure = wanted.structure(depth)
    try:
        same = made_with.structure(depth) == structure
    except SettingError:
        same = False  # the file's model has another depth
    if not same:
        there, here = (in_short(each) for each in (made_with, wanted))
        raise UserError(
            f"weights {source}: made with reduction {there}, which has another structure than {here}{models}"
        )


def fitting_problem(tensors: Mapping[str, Tensor], model: nn.Module, fresh: Set[str] = frozenset()) -> str | None:
    """Which tensors weights lack, have too many or in another shape than a model, in words; None if they fit.

    Args:
        tensors: under the model's names.
        fresh: names that need not be among them.
    """
    own = canonical_state(model)
    if problem := naming_difference(tensors.keys() | fresh, model):
        return problem
    other_shape = sorted(n for n in own.keys() & tensors.keys() - fresh if own[n].shape != tensors[n].shape)
    return f"does not fit in the shape of {_and_more(other_shape)} of this model" if other_shape else None


def naming_difference(names: Set[str], model: nn.Module) -> str | None:
    """Which tensors weights lack or have too many for a model, in words; None if there are none.

    Args:
        names: of the weights, under the model's names. A shared tensor may have one or all of its names.
    """
    own = canonical_state(model).keys()
    if missing := sorted(own - names):
        return f"lacks {_and_more(missing)} of this model"
    if unknown := sorted(names - own - tied_names(model).keys()):
        return f"has {_and_more(unknown)}, which this model lacks"
    return None


def _and_more(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _check_reducible(tensors: Mapping[str, Tensor], model: nn.Module, reduction: Reduction, source: Source) -> None:
    """Refuses unreduced weights for a reduction that acts when a model is built.

    Raises:
        UserError: names the command that makes such weights.
    """
    differing = _differing_names(tensors, model)
    if reduction.factory_arguments() and differing and differing <= mlp_tensors(differing, model):
        given = reduction.model_dump(mode="json", exclude_defaults=True)
        settings = " ".join(
            f"reduction.{key}={value}" for key, value in {"strategy": reduction.strategy, **given}.items()
        )
        raise UserError(
            f"weights {source}: unreduced, and this reduction sets how a model is built: make its weights with "
            f"`scalevit reduce {source} --to NEW.safetensors {settings}`"
        )


def _differing_names(tensors: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """Names that only the weights or only the model has, and those of tensors of another shape."""
    own = canonical_state(model)
    differing = set(own.keys() ^ (tensors.keys() - tied_names(model).keys()))
    return differing | {name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape}


def _is_resampled(before: Tensor | None, now: Tensor) -> bool:
    return before is not None and before.shape != now.shape


def _unused(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the file's tensors of which the conversion has taken nothing, under their own or any other name."""
    starts = sorted(tensor.data_ptr() for tensor in now.values())
    made = [name for name in now if name not in before]  # renamed, or computed from others

    def is_taken(name: str, tensor: Tensor) -> bool:
        first = bisect_left(starts, tensor.data_ptr())
        if first < len(starts) and starts[first] < tensor.data_ptr() + tensor.nbytes:
            return True
        # A resampled tensor has another place in memory, but hardly another name.
        return name in now or any(name.endswith(f".{other}") or ("pos" in name and "pos" in other) for other in made)

    return tuple(name for name, tensor in before.items() if not is_taken(name, tensor))


def differing_models(
    weights: Weights, tensors: Mapping[str, Tensor], model: nn.Module, *, reduced: bool = False
) -> str:
    """The end of a message about weights that do not fit: which model they are of.

    Args:
        tensors: of the weights, under the model's names.
        reduced: whether they may be of the model after another reduction.

    Returns:
        Nothing if the file does not say it, or if it is this model, with any number of classes.
    """
    if weights.model is None:
        return ""
    own = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    stated = f"; weights are of {weights.model}"
    if weights.model.split()[0] != own:
        return f"{stated}, this model is {own}"
    # Under the same name the arguments of timm's factory differ, if anything does: the file's are in `weights.model`.
    differing = _differing_names(tensors, model) - classifier_names(model)
    return stated if differing - (mlp_tensors(differing, model) if reduced else set()) else ""
