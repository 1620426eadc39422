"""What differs between timm's families of transformers: blocks, classifiers, weights of other tools, initialisation.

Knows timm's model classes. Must not know reductions, files or engines.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from timm.models import named_apply
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn, get_init_weights_vit
from torch import Tensor, nn

from scalevit.errors import UserError


class Family(Protocol):
    """A class of timm models that are built and loaded alike."""

    model_class: ClassVar[type[nn.Module]]
    classifiers: ClassVar[tuple[str, ...]]
    """Prefixes of the names of the classifier's parameters, which depend on the number of classes."""
    mlp_branch: ClassVar[tuple[str, ...]]
    """Names of a block's modules that only its MLP's branch uses, the MLP apart."""

    def blocks(self, model: Any) -> list[Any]:
        """The transformer blocks, each with its MLP as `mlp`."""

    def converted(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Weights of other tools under this model's names; position embeddings and patch filters are resampled."""

    def initialise(self, model: Any, leaf: nn.Module, name: str, *, whole: bool) -> None:
        """Gives one module of the model its initial values, with timm's distributions.

        Args:
            leaf: a module whose own parameters are on the CPU, or those of its children too where it is `whole`.
            name: of the leaf in the model; "" for the model itself, which has parameters of its own.
        """

    def initialised_late(self, model: Any) -> str | None:
        """The argument of the model's factory that has it change parameters across leaves after `initialise`."""


class VisionTransformers:
    """timm's `VisionTransformer`: ViT, DeiT, DeiT III, DINOv2, SigLIP, hybrids."""

    model_class: ClassVar[type[nn.Module]] = VisionTransformer
    classifiers: ClassVar[tuple[str, ...]] = ("head.", "head_dist.")
    mlp_branch: ClassVar[tuple[str, ...]] = ("norm2", "ls2", "drop_path2")

    def blocks(self, model: Any) -> list[Any]:
        return list(model.blocks)

    def converted(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        return checkpoint_filter_fn(dict(tensors), model)

    def initialise(self, model: Any, leaf: nn.Module, name: str, *, whole: bool) -> None:
        """As timm's `VisionTransformer.init_weights` does for the whole model."""
        if leaf is model:
            for key, parameter in leaf.named_parameters(recurse=False):
                if key in ("pos_embed", "dist_token"):
                    nn.init.trunc_normal_(parameter, std=0.02)
                elif key in ("cls_token", "reg_token"):
                    nn.init.normal_(parameter, std=1e-6)
            return
        mode = model.weight_init_mode
        head_bias = -math.log(model.num_classes) if "nlhb" in mode else 0.0
        initialise = get_init_weights_vit(mode, head_bias, needs_reset=True)
        if whole:
            named_apply(initialise, leaf, name=name, depth_first=True, include_root=True)
        else:
            initialise(leaf, name)

    def initialised_late(self, model: Any) -> str | None:
        return "fix_init" if getattr(model, "fix_init", False) else None


FAMILIES: tuple[Family, ...] = (VisionTransformers(),)


def family_of(model: nn.Module) -> Family:
    """The family that a model belongs to.

    Raises:
        UserError: none of ours.
    """
    for family in FAMILIES:
        if isinstance(model, family.model_class):
            return family
    supported = " or ".join(family.model_class.__name__ for family in FAMILIES)
    raise UserError(
        f"model {type(model).__name__} is not supported: expected a timm {supported} (ViT, DeiT, DINOv2, SigLIP)"
    )
