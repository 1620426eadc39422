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


def shared_modules(units: Sequence[nn.Module]) -> list[nn.Module]:
    """The outermost modules that lie in more than one of the units, in the order in which they are met."""
    met = Counter(id(module) for unit in units for module in set(unit.modules()))
    shared: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if met[id(child)] > 1:
                shared[id(child)] = child
            else:
                visit(child)

    for unit in units:
        visit(unit)
    return list(shared.values())
