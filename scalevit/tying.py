"""Parameters with several names, and modules that share parameters: how PyTorch represents shared MLPs.

Everything that walks parameters by name (weights files, EMA, engines, checkpoints) looks up here which names belong to
the same parameter. Knows modules of any kind.
"""

from collections import Counter
from collections.abc import Sequence

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


def canonical_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each shared tensor under its canonical name only."""
    tied = tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def uses_per_parameter(model: nn.Module) -> dict[str, int]:
    """How many names each unique parameter has: 1, or the number of blocks that share its MLP."""
    uses = Counter(tied_names(model).values())
    return {name: 1 + uses[name] for name, _ in model.named_parameters()}


def connected_units(units: Sequence[nn.Module]) -> list[list[nn.Module]]:
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
