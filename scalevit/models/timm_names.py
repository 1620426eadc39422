"""The reduced models in timm's registry: `timm.create_model("vit_base_patch16_224_grouped")`.

Each takes the arguments of the timm model it is made from, plus the settings of its reduction (`group_size`, `groups`,
`scale`; `keep`, `select_units`; `mlp_ratio`). Importing this module registers them.
"""

import sys
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from scalevit.errors import UserError
from scalevit.models.reductions import REDUCTIONS
from scalevit.models.reductions.apply import factory_arguments, parse_reduction, reduce_model
from scalevit.models.reductions.base import Reduction
from scalevit.models.weights.match import load_initial_weights
from scalevit.models.weights.structure import difference
from scalevit.tying import accept_shared_once

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


# Arguments that make timm return the model's intermediate features.
_FEATURES = ("features_only", "out_indices", "feature_cls")


def _register(base: str, part: type[Reduction]) -> None:
    def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
        settings = {key: arguments.pop(key) for key in part.model_fields if key in arguments}
        reduction = parse_reduction({"strategy": part.kind(), **settings})
        features = {key: arguments.pop(key) for key in _FEATURES if key in arguments}
        given, arguments = arguments, factory_arguments(reduction, arguments)
        source = _given_weights(arguments) if pretrained else None
        model = timm.create_model(base, pretrained=pretrained and source is None, **arguments)
        # timm would load what fits without a word, and reduced weights would then be reduced again.
        already_reduced = (
            source is not None
            and load_initial_weights(
                model, source, reduction, without_reduction=lambda: timm.create_model(base, **given)
            ).already_reduced
        )
        if not already_reduced:
            reduce_model(model, reduction)
        model.register_load_state_dict_pre_hook(_refuse_other_reduction)  # before that of `accept_shared_once`
        accept_shared_once(model)
        return _as_features(model, features) if features.pop("features_only", False) else model

    create.__name__ = create.__qualname__ = f"{base}_{part.kind()}"
    create.__doc__ = f"{base} with reduction strategy {part.kind()} (arXiv:2512.01059)."
    setattr(sys.modules[__name__], create.__name__, create)
    register_model(create)


def _refuse_other_reduction(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *others: Any) -> None:
    """A hook of torch, which would list every tensor that does not fit. timm loads `checkpoint_path` by it.

    Raises:
        UserError: the state dict is not reduced as the model is.
    """
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    found = difference(own, module)
    if found is not None:
        raise UserError(
            f"state dict: is not reduced as this model is ({found}): write a reduced file by `scalevit reduce`, or "
            "start from this one by scalevit.create_model(weights=FILE)"
        )


def _given_weights(arguments: Mapping[str, Any]) -> str | None:
    """The file, folder or address that timm was told to take as pretrained; None for the registry's own."""
    source = None
    for config in (arguments.get("pretrained_cfg"), arguments.get("pretrained_cfg_overlay")):
        given = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        hub = f"hf-hub:{given['hf_hub_id']}" if given.get("source") == "hf-hub" else None
        source = given.get("file") or hub or source
    return source


def _as_features(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """The model as timm gives it with `features_only=True`. Its wrapper drops later blocks, so it comes last."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    return build_model_with_cfg(
        lambda **arguments: model,
        config.get("architecture", ""),
        False,
        pretrained_cfg=config,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        features_only=True,
        **settings,
    )


for _base in BASE_MODELS:
    for _part in REDUCTIONS:
        if _part.changes_model:
            _register(_base, _part)
