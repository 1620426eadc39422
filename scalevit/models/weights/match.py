"""Matches the tensors of a weights file to a model, which is reduced first where they are reduced already.

So weights are never reduced twice. Knows names and shapes, not file formats.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from scalevit.errors import SettingError, UserError
from scalevit.models.families import family_of
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions.apply import reduce_model
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.weights.read import read_weights
from scalevit.tying import canonical_state, tied_names


def load_initial_weights(model: nn.Module, path: Path, reduction: Reduction) -> bool:
    """Loads weights into an unreduced model; reduces it first where the file's weights are reduced already.

    Returns:
        Whether the model is reduced now.

    Raises:
        UserError: as `match_weights`.
    """
    tensors, already_reduced = match_weights(model, path, reduction)
    with torch.no_grad():
        for name, tensor in canonical_state(model).items():
            if name in tensors and tensor.device.type != "meta":
                tensor.copy_(tensors[name])
    return already_reduced


def match_weights(model: nn.Module, path: Path, reduction: Reduction) -> tuple[dict[str, Tensor], bool]:
    """Reads weights for an unreduced model, and reduces it where they are reduced already.

    Plain weights (of timm, or a run without reduction) fit the model as it is; the caller then reduces it. Position
    embeddings and patch filters of another size are resampled as timm does. A classifier for another number of
    classes is left out: it keeps its initialisation.

    Returns:
        Tensors by canonical name, and whether they, and the model now, are reduced.

    Raises:
        UserError: the file's reduction is not the requested one, or its tensors do not fit.
        SettingError: the requested reduction does not fit the model.
    """
    weights = read_weights(path)
    family = family_of(model)
    already_reduced = not isinstance(weights.reduction, NoReduction)
    if already_reduced:
        _check_structure(path, weights.reduction, reduction, depth=len(transformer_blocks(model)))
        reduce_model(model, reduction)
        tensors = weights.tensors
    else:
        tensors = family.converted(weights.tensors, model)

    own = canonical_state(model)
    classifier = {name for name in own if name.startswith(family.classifiers)}
    fresh = {name for name in classifier if name in tensors and tensors[name].shape[:1] != own[name].shape[:1]}
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
            raise UserError(f"weights {path}: {problem} {names[0]}{more} of this model")
    return {name: tensors[name] for name in own if name not in fresh}, already_reduced


def _check_structure(path: Path, found: Reduction, wanted: Reduction, *, depth: int) -> None:
    """Two reductions are the same if their structure is, whatever acts at initialisation only."""
    wanted_structure = wanted.structure(depth)
    try:
        if found.structure(depth) == wanted_structure:
            return
    except SettingError:
        pass  # the file's model has another depth
    there, here = (json.dumps(each.model_dump(mode="json")) for each in (found, wanted))
    raise UserError(f"weights {path}: made with reduction {there}, which has another structure than {here}")
