"""Parameters with several names, and modules that share parameters: how PyTorch represents shared MLPs.

Everything that walks parameters by name (weights files, EMA, engines, checkpoints) looks up here which names belong to
the same parameter. Knows modules of any kind.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def tied_names(model: nn.Module) -> dict[str, str]:
    """The canonical (first) name of each shared parameter, by its further names."""
    canonical: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = canonical.setdefault(id(parameter), name)
        if first != name:
            tied[name] = first
    return tied


def accept_shared_once(model: nn.Module) -> nn.Module:
    """Makes a model's own `load_state_dict` take state dicts with each shared tensor under its canonical name only.

    Our weights files are so. State dicts in which tensors differ that the model shares are refused.

    Returns:
        The same model.
    """
    if tied_names(model):
        model.register_load_state_dict_pre_hook(_complete_shared)
    return model


def _complete_shared(
    module: nn.Module, state: dict[str, Tensor], prefix: str, *others: Any
) -> None:  # a hook of torch, whose last argument is the list of errors
    for alias, name in tied_names(module).items():
        given, shared = state.get(f"{prefix}{alias}"), state.get(f"{prefix}{name}")
        if given is None and shared is not None:
            state[f"{prefix}{alias}"] = shared
        elif given is not None and shared is not None and not torch.equal(given, shared):
            others[-1].append(f"{alias} and {name} differ, but this model shares them")


def canonical_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each shared tensor under its canonical name only."""
    tied = tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def uses_per_parameter(model: nn.Module) -> dict[str, int]:
    """How many names each unique parameter has: 1, or the number of blocks that share its MLP."""
    uses = Counter(tied_names(model).values())
    return {name: 1 + uses[name] for name, _ in model.named_parameters()}


def group_by_shared_parameters(units: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The units in groups, so that two groups have no parameter in common.

    A unit that shares nothing is a group of its own. Units within a group, and groups by their first units, are in the
    order of `units`.
    """
    own = [set(unit.parameters()) for unit in units]
    groups: list[list[int]] = []
    for index in range(len(units)):
        joined = [group for group in groups if any(own[index] & own[other] for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append(sorted([*(other for group in joined for other in group), index]))
    return [[units[index] for index in group] for group in sorted(groups)]
