"""Which parameters of a model are trained: all but those that a setting names.

Knows names of parameters and the classifier. Must not know optimizers or engines, which leave out what needs no
gradient.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from scalevit.errors import SettingError, nearest_hint
from scalevit.models.families import classifier_names

Frozen = Literal["backbone"] | Sequence[str] | None


def freeze(model: nn.Module, frozen: Frozen) -> nn.Module:
    """Marks parameters that are not trained, in place.

    Args:
        frozen: "backbone" for all but the classifier (a linear probe), or patterns of names, in which `*`, `?` and
            `[0-9]` stand for any text, a character, and one of those. The name of a module covers its parameters:
            "blocks.0" is all of the first block. An MLP that several blocks share is frozen by each of its names.

    Returns:
        The same model.

    Raises:
        SettingError: a pattern names no parameter, or nothing is left to train.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    if frozen == "backbone":
        chosen = set(names) - classifier_names(model)
    else:
        chosen = set()
        for pattern in frozen or ():
            found = {name for name in names if any(fnmatchcase(part, pattern) for part in _beginnings(name))}
            if not found:
                hint = nearest_hint(pattern, {part for name in names for part in _beginnings(name)})
                raise SettingError("frozen", pattern, f"names no parameter of this model{hint}")
            chosen |= found
    for name in chosen:
        names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise SettingError("frozen", frozen, "leaves nothing to train")
    return model


def _beginnings(name: str) -> list[str]:
    """The name of a parameter and of the modules around it: blocks, blocks.0, ..., blocks.0.mlp.fc1.weight."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
