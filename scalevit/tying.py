"""Parameters and modules with several names: what shared MLPs are to PyTorch.

Everything that walks parameters by name (weights files, EMA, engines, checkpoints) asks here which names
mean the same thing.
"""

from collections import Counter
from collections.abc import Sequence

from torch import nn


def tied_names(model: nn.Module) -> dict[str, str]:
    """Every further name of a shared parameter, with its canonical (first) name."""
    canonical: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = canonical.setdefault(id(parameter), name)
        if first != name:
            tied[name] = first
    return tied


def uses_per_parameter(model: nn.Module) -> dict[str, int]:
    """How many names each unique parameter has: 1, or the number of blocks that share its MLP."""
    uses = Counter(tied_names(model).values())
    return {name: 1 + uses[name] for name, _ in model.named_parameters()}


def group_by_shared_parameters(units: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Groups of units such that no two groups have a parameter in common; units keep their order within a group."""
    own = [set(unit.parameters()) for unit in units]
    groups: list[list[int]] = []
    for index in range(len(units)):
        joined = [group for group in groups if any(own[index] & own[other] for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append(sorted([*(other for group in joined for other in group), index]))
    return [[units[index] for index in group] for group in sorted(groups)]
