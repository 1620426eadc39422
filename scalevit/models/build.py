"""From settings to a model: timm's factory, the initial weights, the reduction, the kernels, in this order only.

Knows every step's module. Must not know engines, ranks or data.
"""

from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import nn

from scalevit.config.model import KernelsConfig, ModelConfig
from scalevit.errors import SettingError, nearest_hint, settings_of
from scalevit.models import reductions
from scalevit.models.dropout import set_drop_path
from scalevit.models.families import classifier_names, initialise_classifier
from scalevit.models.fused_mlp import fuse_mlps
from scalevit.models.mlps import mlp_views
from scalevit.models.reductions.apply import factory_arguments, reduce_model
from scalevit.models.reductions.base import Reduction
from scalevit.models.weights.coverage import Coverage
from scalevit.models.weights.match import load_initial_weights

_RESERVED = {
    "num_classes": "is given by model.num_classes",
    "drop_path_rate": "is given by model.drop_path",
    "img_size": "is given by model.image_size",
    "in_chans": "is given by model.in_chans",
    "pretrained": "is given by model.pretrained",
    "checkpoint_path": "cannot be set: name a file in model.initial_weights",
}
_OPTIONAL = ("img_size", "drop_path_rate")


def build_model(
    model: ModelConfig,
    reduction: Reduction,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    kernels: KernelsConfig | None = None,
    run_device: torch.device | None = None,
    need_classifier: bool = False,
    on_weights: Callable[[Coverage], None] = lambda coverage: None,
) -> nn.Module:
    """A reduced Vision Transformer, initialised from a seed and, where given, from weights.

    `scalevit.models.mlps.transformer_blocks` gives its blocks, for engines and planner.

    Args:
        seed: of every random draw of the initialisation; the caller's random state is left as it was.
        device: where it is built; "meta" builds shapes only.
        kernels: how its MLPs are computed; None for timm's own modules.
        run_device: where it will run, for the choice of kernels; where it is built by default.
        need_classifier: refuse initial weights whose classifier is missing or has another number of classes, instead
            of keeping the initialisation of this one.
        on_weights: called with what the initial weights cover, where there are any.

    Raises:
        SettingError: an unknown or unsuitable model, arguments that timm refuses, a reduction that does not fit the
            model, kernels that cannot run.
        UserError: weights that cannot be read or do not fit.
    """
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        network = create_unreduced(model, reduction)
        if reduction.changes_model:
            mlp_views(network)  # refuse another kind of model before anything is done to it
        new_classifier = classifier_names(network)
        with settings_of("reduction"):
            already_reduced = False
            if model.weights_source is not None:
                coverage = load_initial_weights(
                    network,
                    model.weights_source,
                    reduction,
                    without_reduction=lambda: create_unreduced(model, reductions.NO_REDUCTION),
                    weights_set=model.initial_weights_set,
                    need_classifier=need_classifier,
                )
                on_weights(coverage)
                already_reduced = coverage.already_reduced
                new_classifier &= set(coverage.fresh)
            if not already_reduced:
                reduce_model(network, reduction)
        own = dict(network.named_parameters())
        initialise_classifier({name: own[name] for name in new_classifier}, model)
    if kernels is not None:
        fuse_mlps(network, kernels, torch.device(device) if run_device is None else run_device)
    return network


def create_unreduced(model: ModelConfig, reduction: Reduction) -> nn.Module:
    """timm's model with the reduction's arguments of its factory, not yet reduced.

    Raises:
        SettingError: an unknown model, or arguments that timm refuses.
        UserError: a kind of model that is not supported.
    """
    pretrained_config(model.name)
    architecture, _, _ = model.name.partition(".")
    arguments = timm_arguments(model, reduction)
    try:
        network, accepted = create_timm_model(model.name, arguments)
    except Exception as error:
        # timm passes the user's arguments down to constructors that check little and fail in any way.
        if reduction.changes_model:
            with torch.device("meta"):
                mlp_views(timm.create_model(architecture))  # an unsupported kind of model explains it better
        for key in reduction.factory_arguments():
            if f"unexpected keyword argument '{key}'" in str(error):
                reason = f"sets {key}, which timm's {architecture} does not take"
                raise SettingError("reduction.strategy", reduction.strategy, reason) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SettingError("model.name", model.name, f"cannot be built with these arguments ({reason})") from error
    if model.drop_path and "drop_path_rate" not in accepted:
        raise SettingError("model.drop_path", model.drop_path, f"timm's {architecture} has no stochastic depth: use 0")
    if model.drop_path and model.drop_path_mode == "constant":
        set_drop_path(network, model.drop_path)
    _check_trainable(model.name, network)
    _check_patches(network, model.image_size)
    return network


def timm_arguments(model: ModelConfig, reduction: Reduction) -> dict[str, Any]:
    """What timm's factory is called with for a model; `create_timm_model` leaves out what a model does not take.

    Raises:
        SettingError: an argument is given by another setting.
    """
    for key in model.kwargs.keys() & _RESERVED.keys():
        raise SettingError(f"model.kwargs.{key}", model.kwargs[key], _RESERVED[key])
    with settings_of("model.kwargs"):
        return {
            "num_classes": model.num_classes,
            "drop_path_rate": model.drop_path,
            "img_size": model.image_size,
            **({} if model.in_chans == 3 else {"in_chans": model.in_chans}),
            **factory_arguments(reduction, model.kwargs),
        }


def create_timm_model(name: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """timm's model, and those of the arguments that it takes: not every model has an image size or stochastic depth."""
    accepted = dict(arguments)
    while True:
        try:
            return timm.create_model(name, **accepted), accepted
        except TypeError as error:
            unknown = [key for key in _OPTIONAL if f"unexpected keyword argument '{key}'" in str(error)]
            if not unknown:
                raise
            del accepted[unknown[0]]


def _check_trainable(name: str, network: nn.Module) -> None:
    """Refuses models that cannot be trained as classifiers with results that do not depend on the number of ranks.

    Raises:
        SettingError: an encoder without a classifier, or batch norms.
    """
    if not hasattr(network, "get_classifier"):
        raise SettingError("model.name", name, "has no classifier")
    if any(getattr(module, "running_mean", None) is not None for module in network.modules()):
        raise SettingError(
            "model.name",
            name,
            "has batch norms, whose statistics depend on how a batch is divided among ranks: take a model without",
        )


def _check_patches(network: nn.Module, image_size: int) -> None:
    """Refuses images of which timm's patch embedding would drop the right and lower border.

    Raises:
        SettingError: the patch size does not divide the image size, and the model does not pad.
    """
    embedding = getattr(network, "patch_embed", None)
    projection = getattr(embedding, "proj", None)
    if isinstance(projection, nn.Conv2d) and projection.stride != projection.kernel_size:
        return  # patches overlap
    side = max(getattr(embedding, "patch_size", None) or (1,))
    if image_size % side and not getattr(embedding, "dynamic_img_pad", False):
        lower = image_size // side * side
        sizes = f"{lower} or {lower + side}" if lower else f"{side}"
        raise SettingError(
            "model.image_size",
            image_size,
            f"is not a multiple of the patch size {side}: use {sizes}, or pad by model.kwargs.dynamic_img_pad=true",
        )


def pretrained_config(name: str) -> timm.models.PretrainedCfg:
    """What timm knows of the pretrained weights of a model, of those of the tag in its name: size of the images, ...

    Args:
        name: e.g. "vit_base_patch16_224" or "vit_base_patch16_224.augreg_in1k".

    Raises:
        SettingError: timm has no such model, or no such tag of it.
    """
    architecture, _, tag = name.partition(".")
    base, _, strategy = architecture.rpartition("_")
    if strategy in {part.kind() for part in reductions.REDUCTIONS} and timm.is_model(base):
        raise SettingError("model.name", name, f"is reduced already: name {base} and reduction.strategy {strategy}")
    if not timm.is_model(architecture):
        hint = nearest_hint(name, timm.list_models(), cutoff=0.3)
        raise SettingError("model.name", name, f"is not a timm model{hint}")
    tagged = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in tagged:
        hint = nearest_hint(name, tagged, cutoff=0.0)
        raise SettingError("model.name", name, f"timm knows no weights of {architecture} with this tag{hint}")
    return timm.get_pretrained_cfg(name, allow_unregistered=True) or timm.models.PretrainedCfg()
