"""The models for use from Python: build a reduced model, reduce a model, load its weights.

Public as `scalevit.create_model`, `scalevit.reduce_model` and `scalevit.load_weights`.
"""

import os
from typing import Any

import torch
from torch import nn

from scalevit.config.base import parse_section
from scalevit.config.model import ModelConfig, WeightsSet
from scalevit.errors import SettingError, UserError
from scalevit.models.build import build_model, pretrained_config
from scalevit.models.reductions import REDUCTIONS
from scalevit.models.reductions.apply import parse_reduction
from scalevit.models.reductions.apply import reduce_model as apply_reduction
from scalevit.models.reductions.base import Reduction
from scalevit.models.weights.hub import Source
from scalevit.models.weights.match import adapted_input, check_floating, differing_models, naming_difference
from scalevit.models.weights.read import read_weights
from scalevit.tying import accept_shared_once, canonical_state, tied_names


def create_model(
    name: str,
    reduction: str | Reduction = "grouped",
    *,
    weights: Source | None = None,
    weights_set: WeightsSet = "auto",
    pretrained: bool = False,
    seed: int = 0,
    **kwargs: Any,
) -> nn.Module:
    """Builds a reduced timm Vision Transformer, on the CPU and in training mode.

    Args:
        name: a model of timm's registry, e.g. "vit_base_patch16_224".
        reduction: "none", "grouped", "shallow" or "thin", or its settings.
        weights: what to start from, as `model.initial_weights` of the config: a file of a run (reduced alike), of timm
            or of the paper's code (reduced alike or not), a folder or an address. None initialises from the seed.
        weights_set: which weights of a file with several: "weights", "ema", or "auto" for the EMA where there is one.
        pretrained: starts from timm's pretrained weights of the name.
        seed: of the initialisation; the caller's random state does not change.
        kwargs: settings of the reduction (`group_size`, `keep`, ...) and arguments of timm's factory (`num_classes`,
            `img_size`, `in_chans`, `drop_path_rate`, `global_pool`, ...).

    Returns:
        A model that maps images (B, in_chans, H, W) to logits (B, num_classes). Filters of RGB weights are adapted to
        another number of channels as timm does; a run of scalevit trains on RGB or grey images.

    Raises:
        UserError: an unknown model, reduction or argument, or weights that do not fit.
    """
    if pretrained and weights is not None:
        raise SettingError("weights", os.fspath(weights), "pretrained=True names weights too: give one of the two")
    if isinstance(reduction, str):
        fields = {field for part in REDUCTIONS if part.kind() == reduction for field in part.model_fields}
        own = {key: kwargs.pop(key) for key in fields & kwargs.keys()}
        reduction = parse_reduction({**own, "strategy": reduction})
    channels, _, size = pretrained_config(name).input_size
    model = parse_section(
        ModelConfig,
        {
            "name": name,
            "image_size": kwargs.pop("img_size", size),
            "in_chans": kwargs.pop("in_chans", channels),
            "num_classes": kwargs.pop("num_classes", 1000),
            "drop_path": kwargs.pop("drop_path_rate", 0.0),
            "initial_weights": None if weights is None else os.fspath(weights),
            "initial_weights_set": weights_set,
            "pretrained": pretrained,
            "kwargs": kwargs,
        },
    )
    return accept_shared_once(build_model(model, reduction, seed=seed))


def reduce_model(model: nn.Module, reduction: str | Reduction = "grouped", **settings: Any) -> nn.Module:
    """Reduces a timm Vision Transformer in place, e.g. one with pretrained weights.

    Args:
        model: a timm VisionTransformer whose blocks have timm's `Mlp`.
        reduction: "grouped" or "shallow", or its settings. "thin" is an argument of timm's factory: use `create_model`.
        settings: of the reduction, e.g. `group_size=2`.

    Returns:
        The same model.

    Raises:
        UserError: the model cannot be reduced, or the reduction does not fit it.
    """
    if isinstance(reduction, str):
        reduction = parse_reduction({**settings, "strategy": reduction})
    if reduction.factory_arguments():
        raise SettingError("reduction", reduction.strategy, "applies when a model is built: use create_model")
    return accept_shared_once(apply_reduction(model, reduction))


def load_weights(model: nn.Module, path: Source, *, weights_set: WeightsSet = "auto") -> nn.Module:
    """Loads a weights file into a model that has its structure already.

    Filters of RGB weights are adapted to the model's number of input channels, as timm does.

    Args:
        model: of `create_model` or `reduce_model`, with the reduction that the file was made with.
        path: a safetensors file of a run, a state dict or a checkpoint saved by torch, or a folder or an address of the
            Hugging Face hub.
        weights_set: which weights of a file with several: "weights", "ema", or "auto" for the EMA where there is one.

    Returns:
        The same model.

    Raises:
        UserError: the file cannot be read, or does not have exactly the model's tensors.
    """
    weights = read_weights(path, weights_set=weights_set)
    tensors = adapted_input(weights.tensors, model)
    check_floating(tensors, model, path)
    models = differing_models(weights, tensors, model)
    for alias, name in tied_names(model).items():
        # A plain state dict lists a shared tensor once per use. One of an unreduced model has others there.
        if alias in tensors and name in tensors:
            if not torch.equal(tensors[alias], tensors[name]):
                raise UserError(f"weights {path}: {alias} and {name} differ, but this model shares them{models}")
            del tensors[alias]
    own = canonical_state(model)
    if problem := naming_difference(tensors.keys(), model):
        raise UserError(f"weights {path}: {problem}{models}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            found, wanted = list(tensor.shape), list(own[name].shape)
            raise UserError(f"weights {path}: {name} has shape {found}, the model's has {wanted}{models}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return model
