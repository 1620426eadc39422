"""From a config to a model: timm's factory, the initial weights, the reduction, in this order."""

import difflib
from typing import Any

import timm
import torch
from torch import nn

from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.mlps import factory_arguments, mlp_blocks, reduce_model
from scalevit.models.reductions.base import Reduction
from scalevit.models.weights.match import load_initial_weights

_NOT_FOR_USERS = {
    "in_chans": "images are loaded in RGB",
    "pretrained": "name a file in model.initial_weights",
    "checkpoint_path": "name a file in model.initial_weights",
}


def build_model(
    model: ModelConfig, reduction: Reduction, *, seed: int, device: torch.device | str = "cpu"
) -> nn.Module:
    """A reduced Vision Transformer, initialised from a seed and, where given, from weights.

    Args:
        seed: of every random draw of the initialisation; the caller's random state is left as it was.
        device: where it is built; "meta" builds shapes only.

    Raises:
        UserError: an unknown or unsuitable model, or arguments that timm refuses.
    """
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        network = create_unreduced(model, reduction)
        mlp_blocks(network)  # refuse another kind of model before anything is done to it
        already_reduced = False
        if model.initial_weights is not None:
            already_reduced = load_initial_weights(network, model.initial_weights, reduction)
        if not already_reduced:
            reduce_model(network, reduction)
    return network


def create_unreduced(model: ModelConfig, reduction: Reduction) -> nn.Module:
    """timm's model, before grouped or shallow; thin is in the factory's arguments.

    Raises:
        UserError: an unknown model, or arguments that timm refuses.
    """
    if not timm.is_model(model.name):
        near = difflib.get_close_matches(model.name, timm.list_models(), n=1, cutoff=0.3)
        nearest = f"; nearest: {near[0]}" if near else ""
        raise UserError(f"config: model.name = {model.name!r} is not a timm model{nearest}")
    arguments: dict[str, Any] = {
        "num_classes": model.num_classes,
        "drop_path_rate": model.drop_path,
        "img_size": model.image_size,
    }
    for key in model.kwargs:
        if key in arguments:
            raise UserError(f"config: model.kwargs.{key} has a key of its own in the model section")
        if key in _NOT_FOR_USERS:
            raise UserError(f"config: model.kwargs.{key}: {_NOT_FOR_USERS[key]}")
    arguments |= model.kwargs
    arguments |= factory_arguments(reduction, model.kwargs)
    try:
        return timm.create_model(model.name, **arguments)
    except Exception as error:
        # timm passes the user's arguments down to constructors that check little and fail in any way.
        with torch.device("meta"):
            mlp_blocks(timm.create_model(model.name.partition(".")[0]))  # another kind of model explains it better
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"config: model {model.name!r} cannot be built with these arguments ({reason})") from error
