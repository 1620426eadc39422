"""The reduced models in timm's registry: `timm.create_model("vit_base_patch16_224_grouped")`.

Each takes the arguments of the timm model it is made from, plus those of its strategy (`group_size`, `groups`,
`scale`; `keep`, `select_units`; `mlp_ratio`).
"""

import sys
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from scalevit.models.mlps import factory_arguments, reduce_model
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.models.reductions.thin import ThinReduction

_STRATEGIES: dict[str, type[GroupedReduction] | type[ShallowReduction] | type[ThinReduction]] = {
    "grouped": GroupedReduction,
    "shallow": ShallowReduction,
    "thin": ThinReduction,
}

BASE_MODELS = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
    "deit3_small_patch16_224",
    "deit3_base_patch16_224",
    "deit3_large_patch16_224",
    "deit3_huge_patch14_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_dinov2",
    "vit_large_patch14_dinov2",
)
"""timm models that have reduced variants under `<name>_grouped`, `<name>_shallow` and `<name>_thin`."""


def _register(base: str, strategy: str) -> None:
    kind = _STRATEGIES[strategy]

    def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
        settings = {key: arguments.pop(key) for key in kind.model_fields if key in arguments}
        reduction: Reduction = kind.model_validate(settings)
        arguments |= factory_arguments(reduction, arguments)
        return reduce_model(timm.create_model(base, pretrained=pretrained, **arguments), reduction)

    create.__name__ = create.__qualname__ = f"{base}_{strategy}"
    create.__doc__ = f"{base} with reduction strategy {strategy} (arXiv:2512.01059)."
    setattr(sys.modules[__name__], create.__name__, create)
    register_model(create)


for _base in BASE_MODELS:
    for _strategy in _STRATEGIES:
        _register(_base, _strategy)
