"""The initial values of a model that is larger than a host's memory: one leaf at a time, each from its own seed.

The values have timm's distributions and the reduction's scale and width, but are not those of `build_model`, which
draws all of them from one sequence. They depend on the config and the seed only: every rank of every engine draws the
same values, and keeps its part.
"""

import math
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.build import build_model, create_unreduced
from scalevit.models.families import LayerInitialiser
from scalevit.models.mlps import MlpView, mlp_places, transformer_blocks
from scalevit.models.reductions import NO_REDUCTION
from scalevit.models.reductions.apply import mlp_sources
from scalevit.models.reductions.base import Reduction
from scalevit.models.weights.match import match_weights


def initial_values(model: ModelConfig, reduction: Reduction, *, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every unique parameter and buffer of the reduced model by its canonical name, on the CPU, whole.

    The host holds one leaf at a time: a layer, or an MLP before its reduction. `model.initial_weights` are read in
    place of random numbers (a safetensors file is mapped, not read whole).

    Raises:
        SettingError: as `build_model`.
        UserError: the weights do not fit, or timm initialises a part of this model in a way that is not known here.
    """
    without_file = model.without_weights()
    shapes = _shapes(build_model(without_file, reduction, seed=seed, device="meta"))
    with torch.device("meta"):
        network = create_unreduced(model, reduction)
    initialise = LayerInitialiser(network)
    weights: dict[str, Tensor] = {}
    already_reduced = False
    if model.weights_source is not None:
        with torch.device("meta"):
            other = create_unreduced(model, reduction)  # which may become reduced
        matched = match_weights(
            other,
            model.weights_source,
            reduction,
            without_reduction=lambda: create_unreduced(model, NO_REDUCTION),
            weights_set=model.initial_weights_set,
        )
        weights, already_reduced = matched.tensors, matched.coverage.already_reduced
    mlps: set[nn.Module] = {place.module for block in transformer_blocks(network) for place in mlp_places(block)}
    yielded: set[str] = set()
    for name, leaf, whole in _leaves(network, mlps):
        own = [key for key in _named(leaf, name, whole=whole) if key in shapes]
        if not own:
            continue  # an MLP that the reduction removes, or replaces by that of another block
        leaf.to_empty(device="cpu", recurse=whole)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(_seed(seed, name))
            for tensor in _named(leaf, name, whole=whole).values():
                if tensor.is_floating_point():
                    tensor.fill_(math.nan)  # finds what is never initialised
            initialise(leaf, name, whole=whole)
        # In the order of `build_model`: reduced weights are loaded after the reduction, others before.
        if not already_reduced:
            _load(leaf, name, weights, whole=whole)
        if whole:
            _transform(network, leaf, reduction)
        if already_reduced:
            _load(leaf, name, weights, whole=whole)
        for key, tensor in _named(leaf, name, whole=whole).items():
            if key in shapes:
                if tensor.isnan().any():
                    raise UserError(f"model {model.name}: meta initialisation does not know how timm initialises {key}")
                assert tensor.shape == shapes[key], f"{key}: {tensor.shape} for {shapes[key]}"
                yielded.add(key)
                yield key, tensor.detach()
        leaf.to_empty(device="meta", recurse=whole)
    assert yielded == shapes.keys(), f"without initial values: {sorted(shapes.keys() - yielded)[:4]}"


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _leaves(module: nn.Module, mlps: set[nn.Module], name: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, whether with its children): what is initialised at a time.

    Args:
        mlps: modules that are reduced, so initialised, as a whole.
    """
    # A module's own init_weights may change its children's values after theirs; `LayerInitialiser` does the root's.
    if name and (hasattr(module, "init_weights") or module in mlps):
        yield name, module, True
        return
    if _named(module, name, whole=False):
        yield name, module, False
    for child_name, child in module.named_children():
        yield from _leaves(child, mlps, f"{name}.{child_name}".lstrip("."))


def _named(module: nn.Module, name: str, *, whole: bool) -> dict[str, Tensor]:
    tensors = [*module.named_parameters(recurse=whole), *module.named_buffers(recurse=whole)]
    return {f"{name}.{key}".lstrip("."): tensor for key, tensor in tensors}


@torch.no_grad()
def _load(leaf: nn.Module, name: str, weights: dict[str, Tensor], *, whole: bool) -> None:
    for key, tensor in _named(leaf, name, whole=whole).items():
        if key in weights:
            tensor.copy_(weights[key])


def _transform(network: nn.Module, leaf: nn.Module, reduction: Reduction) -> None:
    """Transforms the MLP that the leaf, with its children, is or holds, as `reduce_model` does."""
    blocks = transformer_blocks(network)
    inside = set(leaf.modules())
    for block, source in enumerate(mlp_sources(reduction, len(blocks))):
        for place in mlp_places(blocks[block]) if source == block else []:
            if place.module in inside:
                reduction.transform(MlpView(place.module), block, len(blocks))


def _seed(seed: int, name: str) -> int:
    """The seed of a leaf's random draws: a function of its name, so independent of what was drawn before."""
    word = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1, np.uint64)[0]
    return int(word >> np.uint64(1))
