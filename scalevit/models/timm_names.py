"""The reduced models in timm's registry: `timm.create_model("vit_base_patch16_224_grouped")`.

Each takes the arguments of the timm model it is made from, plus the settings of its reduction (`group_size`, `groups`,
`scale`; `keep`, `select_units`; `mlp_ratio`). Importing this module registers them.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from scalevit.models.reductions import REDUCTIONS
from scalevit.models.reductions.apply import factory_arguments, parse_reduction, reduce_model
from scalevit.models.reductions.base import Reduction
from scalevit.models.weights.match import load_initial_weights
from scalevit.models.weights.read import is_reduced

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
"""timm models that have a reduced variant `<name>_<strategy>` for each reduction."""


def _register(base: str, part: type[Reduction]) -> None:
    def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
        settings = {key: arguments.pop(key) for key in part.model_fields if key in arguments}
        reduction = parse_reduction({"strategy": part.kind(), **settings})
        arguments = factory_arguments(reduction, arguments)
        file = _reduced_file(arguments) if pretrained else None
        if file is None:
            return reduce_model(timm.create_model(base, pretrained=pretrained, **arguments), reduction)
        # timm would load what fits without a word, and the model would then be reduced again.
        model = timm.create_model(base, pretrained=False, **arguments)
        load_initial_weights(model, file, reduction)
        return model

    create.__name__ = create.__qualname__ = f"{base}_{part.kind()}"
    create.__doc__ = f"{base} with reduction strategy {part.kind()} (arXiv:2512.01059)."
    setattr(sys.modules[__name__], create.__name__, create)
    register_model(create)


def _reduced_file(arguments: Mapping[str, Any]) -> Path | None:
    """The weights file that timm was told to take as pretrained, where its weights are reduced already."""
    file = None
    for config in (arguments.get("pretrained_cfg"), arguments.get("pretrained_cfg_overlay")):
        given = config.get("file") if isinstance(config, Mapping) else getattr(config, "file", None)
        file = given or file
    return Path(file) if file and is_reduced(Path(file)) else None


for _base in BASE_MODELS:
    for _part in REDUCTIONS:
        if _part.changes_model:
            _register(_base, _part)
