"""Matches the tensors of a weights file to a model, which is reduced first where they are reduced already.

So weights are never reduced twice. Knows names and shapes, not file formats.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalevit.errors import SettingError, UserError
from scalevit.models.families import classifier_names, converted
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions.apply import reduce_model
from scalevit.models.reductions.base import Reduction
from scalevit.models.weights.read import Weights, read_weights
from scalevit.tying import canonical_state, tied_names


@dataclass(frozen=True)
class Coverage:
    """What a weights file gives to a model, and what not."""

    tensors: int
    """Of the model, that are taken from the file."""
    already_reduced: bool
    """Whether they, and the model now, are reduced."""
    fresh: tuple[str, ...]
    """Names that keep their initialisation: a classifier that is missing or for another number of classes."""
    resampled: tuple[str, ...]
    """Names of position embeddings and patch filters that had another size in the file."""

    def __str__(self) -> str:
        taken, whole = self.tensors, self.tensors + len(self.fresh)
        parts = [f"{taken} of {whole} tensors" if self.fresh else f"all {taken} tensors"]
        parts += [f"{', '.join(names)} {what}" for names, what in self._others() if names]
        return "; ".join(parts)

    def _others(self) -> list[tuple[tuple[str, ...], str]]:
        return [(self.fresh, "newly initialised"), (self.resampled, "resampled")]


class MatchedWeights(NamedTuple):
    """The tensors of a file for a model, by the model's canonical names, and what they cover."""

    tensors: dict[str, Tensor]
    coverage: Coverage


def load_initial_weights(
    model: nn.Module, path: Path, reduction: Reduction, *, need_classifier: bool = False
) -> Coverage:
    """Loads weights into an unreduced model; reduces it first where the file's weights are reduced already.

    Args:
        need_classifier: as for `match_weights`.

    Returns:
        What they cover. Where they are reduced already, the model is so now.

    Raises:
        UserError: as `match_weights`.
    """
    matched = match_weights(model, path, reduction, need_classifier=need_classifier)
    with torch.no_grad():
        for name, tensor in canonical_state(model).items():
            if name in matched.tensors and tensor.device.type != "meta":
                tensor.copy_(matched.tensors[name])
    return matched.coverage


def match_weights(
    model: nn.Module, path: Path, reduction: Reduction, *, need_classifier: bool = False
) -> MatchedWeights:
    """Reads weights for an unreduced model, and reduces it where they are reduced already.

    Plain weights (of timm, or a run without reduction) fit the model as it is; the caller then reduces it. Position
    embeddings and patch filters of another size are resampled as timm does. A classifier that is missing, or for
    another number of classes, is left out: it keeps its initialisation.

    Args:
        need_classifier: refuse weights whose classifier is missing or for another number of classes.

    Raises:
        UserError: the file's reduction is not the requested one, or its tensors do not fit.
        SettingError: the requested reduction does not fit the model.
    """
    weights = read_weights(path)
    models = differing_models(weights, model)
    if weights.reduction is not None:
        depth = len(transformer_blocks(model))
        if not _same_structure(weights.reduction, reduction, depth):
            there, here = (json.dumps(each.model_dump(mode="json")) for each in (weights.reduction, reduction))
            raise UserError(
                f"weights {path}: made with reduction {there}, which has another structure than {here}{models}"
            )
        reduce_model(model, reduction)
    tensors = converted(weights.tensors, model)

    own = canonical_state(model)
    classifier = classifier_names(model)
    fresh = {name for name in classifier & tensors.keys() if tensors[name].shape[:1] != own[name].shape[:1]}
    if fresh and need_classifier:
        held, wanted = (each[min(fresh)].shape[0] for each in (tensors, own))
        raise UserError(
            f"weights {path}: have a classifier of {held} classes, but model.num_classes = {wanted}{models}"
        )
    if not need_classifier and not classifier & tensors.keys():  # of a backbone, such as DINOv2's
        fresh = classifier
    missing = sorted(own.keys() - tensors.keys() - fresh)
    unknown = sorted(tensors.keys() - own.keys() - tied_names(model).keys())
    other_shape = sorted(n for n in own.keys() & tensors.keys() - fresh if own[n].shape != tensors[n].shape)
    for problem, names in (
        ("lacks", missing),
        ("has the unknown", unknown),
        ("does not fit in the shape of", other_shape),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"weights {path}: {problem} {names[0]}{more} of this model{models}")
    taken = {name: tensors[name] for name in own if name not in fresh}
    before = weights.tensors
    resampled = tuple(name for name, tensor in taken.items() if name in before and before[name].shape != tensor.shape)
    coverage = Coverage(len(taken), weights.reduction is not None, tuple(sorted(fresh)), resampled)
    return MatchedWeights(taken, coverage)


def differing_models(weights: Weights, model: nn.Module) -> str:
    """The end of a message about weights that do not fit: which model they are of; nothing if the file does not say."""
    if weights.model is None:
        return ""
    own = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    return f"; weights are of {weights.model}, this model is {own}"


def _same_structure(one: Reduction, other: Reduction, depth: int) -> bool:
    """Two reductions are the same if their structure is, whatever acts at initialisation only."""
    wanted = other.structure(depth)
    try:
        return one.structure(depth) == wanted
    except SettingError:
        return False  # the file's model has another depth
