"""What differs between timm's families of transformers: classifiers, weights of other tools, initialisation by layers.

Knows timm's models by what they offer, and a class only where timm leaves no other way. Must not know reductions, files
or engines.
"""

import inspect
import math
import sys
from collections.abc import Mapping
from typing import Any

from timm.models import named_apply
from timm.models.vision_transformer import VisionTransformer, get_init_weights_vit
from torch import Tensor, nn

from scalevit.config.model import ModelConfig
from scalevit.errors import SettingError, UserError


def classifier_names(model: Any) -> set[str]:
    """Names of the classifier's parameters (of both, in distilled models), which depend on the number of classes."""
    found = model.get_classifier()
    heads = [head for head in (found if isinstance(found, tuple) else (found,)) if isinstance(head, nn.Module)]
    own = {id(parameter) for head in heads for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def initialise_classifier(parameters: Mapping[str, Tensor], model: ModelConfig) -> None:
    """Changes the initial values of a classifier in place, as timm's trainer does.

    Args:
        parameters: of the classifier, by name; those that keep their values left out.
        model: with the factor and the bias.

    Raises:
        SettingError: there is no bias.
    """
    biases = [tensor for name, tensor in parameters.items() if name.endswith("bias")]
    if model.head_init_bias is not None and parameters and not biases:
        raise SettingError("model.head_init_bias", model.head_init_bias, "the classifier has no bias")
    if model.head_init_scale is not None:
        for tensor in parameters.values():
            tensor.detach().mul_(model.head_init_scale)
    if model.head_init_bias is not None:
        for tensor in biases:
            nn.init.constant_(tensor, model.head_init_bias)


def converted(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of other tools under this model's names; position embeddings and patch filters are resampled.

    By the `checkpoint_filter_fn` of the timm module that defines the model's class; without one they stay as they are.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return dict(tensors)
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(convert).parameters else {}
    return convert(dict(tensors), model, **options)


class LayerInitialiser:
    """Gives the modules of a model their initial values one by one, with timm's distributions, for `meta_init`.

    Raises:
        UserError: timm initialises models of this class in a way that is not known here.
    """

    def __init__(self, model: nn.Module):
        if not isinstance(model, VisionTransformer):
            raise UserError(
                f"meta initialisation does not know how timm initialises a {type(model).__name__}: it needs a timm "
                "VisionTransformer (ViT, DeiT, DINOv2, SigLIP)"
            )
        if getattr(model, "fix_init", False):  # changes parameters across layers afterwards
            raise UserError("meta initialisation cannot be combined with the model's argument fix_init")
        self._model: Any = model

    def __call__(self, layer: nn.Module, name: str, *, whole: bool) -> None:
        """As timm's `VisionTransformer.init_weights` does for the whole model.

        Args:
            layer: a module whose own parameters are on the CPU, or those of its children too where it is `whole`.
            name: of the layer in the model; "" for the model itself, which has parameters of its own.
        """
        if layer is self._model:
            for key, parameter in layer.named_parameters(recurse=False):
                if key in ("pos_embed", "dist_token"):
                    nn.init.trunc_normal_(parameter, std=0.02)
                elif key in ("cls_token", "reg_token"):
                    nn.init.normal_(parameter, std=1e-6)
            return
        mode = self._model.weight_init_mode
        head_bias = -math.log(self._model.num_classes) if "nlhb" in mode else 0.0
        initialise = get_init_weights_vit(mode, head_bias, needs_reset=True)
        if whole:
            named_apply(initialise, layer, name=name, depth_first=True, include_root=True)
        else:
            initialise(layer, name)
