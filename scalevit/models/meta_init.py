"""The initial values of a model that no host could hold: one leaf after another, each from a seed of its own.

The values have timm's distributions and the reduction's scale and width, but are not those of `build_model`, which
draws all of them from one sequence. They depend on the config and the seed alone: every rank of every engine draws the
same, and keeps its part.
"""

import math
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from timm.layers import Mlp
from timm.models import named_apply
from timm.models.vision_transformer import get_init_weights_vit
from torch import Tensor, nn

from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.build import build_model, create_unreduced
from scalevit.models.mlps import mlp_blocks, narrow_mlp, resolve_groups, scale_mlp
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.models.weights.match import fitting_weights


def initial_values(model: ModelConfig, reduction: Reduction, *, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every unique parameter and buffer of the reduced model by its canonical name, on the CPU, whole.

    The host holds one leaf at a time: a layer, or an MLP, before its reduction. `model.initial_weights` are read in
    place of random numbers (a safetensors file is mapped, not read whole).

    Raises:
        UserError: the weights do not fit, or timm initialises a part of this model in a way that is not known here.
    """
    with torch.device("meta"):
        network = create_unreduced(model, reduction)
    without_file = model.model_copy(update={"initial_weights": None})
    shapes = _shapes(build_model(without_file, reduction, seed=seed, device="meta"))
    weights: dict[str, Tensor] = {}
    already_reduced = False
    if model.initial_weights is not None:
        weights, already_reduced = fitting_weights(network, model.initial_weights, reduction)
    if getattr(network, "fix_init", False):
        raise UserError("config: model.kwargs.fix_init cannot be combined with train.meta_init: remove one of them")
    met: set[str] = set()
    for name, leaf, whole in _leaves(network):
        own = [key for key in _named(leaf, name, whole=whole) if key in shapes]
        if not own:
            continue  # an MLP that another block's replaces
        leaf.to_empty(device="cpu", recurse=whole)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(_seed(seed, name))
            for tensor in _named(leaf, name, whole=whole).values():
                if tensor.is_floating_point():
                    tensor.fill_(math.nan)  # so that what nobody initialises is found
            _initialise(network, leaf, name, whole=whole)
            for key, tensor in _named(leaf, name, whole=whole).items():
                if key in weights:
                    tensor.copy_(weights[key])
        if whole and not already_reduced:
            _reduce(network, leaf, reduction)
        for key, tensor in _named(leaf, name, whole=whole).items():
            if key in shapes:
                if tensor.isnan().any():
                    raise UserError(f"config: train.meta_init = true does not know how timm initialises {key}")
                assert tensor.shape == shapes[key], f"{key}: {tensor.shape} for {shapes[key]}"
                met.add(key)
                yield key, tensor.detach()
        leaf.to_empty(device="meta", recurse=whole)
    assert met == shapes.keys(), f"without initial values: {sorted(shapes.keys() - met)[:4]}"


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, whether with its children): what is initialised at a time."""
    # A module's own init_weights may change its children's values after theirs; the root's is `_initialise`.
    if name and (hasattr(module, "init_weights") or isinstance(module, Mlp)):
        yield name, module, True
        return
    if _named(module, name, whole=False):
        yield name, module, False
    for child_name, child in module.named_children():
        yield from _leaves(child, f"{name}.{child_name}".lstrip("."))


def _named(module: nn.Module, name: str, *, whole: bool) -> dict[str, Tensor]:
    tensors = [*module.named_parameters(recurse=whole), *module.named_buffers(recurse=whole)]
    return {f"{name}.{key}".lstrip("."): tensor for key, tensor in tensors}


def _initialise(network: nn.Module, leaf: nn.Module, name: str, *, whole: bool) -> None:
    """As timm's `VisionTransformer.init_weights` does, for one leaf."""
    if leaf is network:
        for key, parameter in leaf.named_parameters(recurse=False):
            if key in ("pos_embed", "dist_token"):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif key in ("cls_token", "reg_token"):
                nn.init.normal_(parameter, std=1e-6)
        return
    mode: str = network.weight_init_mode  # type: ignore[assignment]
    head_bias = -math.log(network.num_classes) if "nlhb" in mode else 0.0  # type: ignore[arg-type]
    initialise = get_init_weights_vit(mode, head_bias, needs_reset=True)
    if whole:
        named_apply(initialise, leaf, name=name, depth_first=True, include_root=True)
    else:
        initialise(leaf, name)


def _reduce(network: nn.Module, leaf: nn.Module, reduction: Reduction) -> None:
    """Scales or narrows the MLP that the leaf is or holds."""
    blocks = mlp_blocks(network)
    inside = set(leaf.modules())
    for index, block in enumerate(blocks):
        if block.mlp not in inside:
            continue
        if isinstance(reduction, ShallowReduction):
            narrow_mlp(block.mlp, reduction.keep, select_units=reduction.select_units)
        elif isinstance(reduction, GroupedReduction):
            group = next(group for group in resolve_groups(reduction, depth=len(blocks)) if index in group)
            if len(group) > 1 and index == group[0]:
                scale_mlp(block.mlp, reduction.scale)


def _seed(seed: int, name: str) -> int:
    """Of a leaf's random draws: of its name, so that it does not depend on what was drawn before."""
    word = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1, np.uint64)[0]
    return int(word >> np.uint64(1))
