"""Reads weights files: ours (safetensors with metadata) and plain state dicts. Never executes what it reads."""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from scalevit.config.model import WeightsSet
from scalevit.errors import SettingError, UserError
from scalevit.models.reductions.apply import parse_reduction
from scalevit.models.reductions.base import Reduction
from scalevit.models.weights.description import METADATA_KEY, own_metadata
from scalevit.models.weights.hub import Source, WeightsFile, find_weights
from scalevit.models.weights.npz import SUFFIX as NPZ
from scalevit.models.weights.npz import read_npz
from scalevit.models.weights.plain import ONE_SET, no_such_set, read_plain, unwrapped
from scalevit.models.weights.whole import check_whole


@dataclass(frozen=True)
class Weights:
    """The content of a weights file."""

    tensors: dict[str, Tensor]
    reduction: Reduction | None
    """That the file says to have been applied to the model; None for an unreduced one, and if the file does not say."""
    tied: dict[str, str]
    """Further name of a shared tensor -> the name that it is stored under."""
    model: str | None
    """timm's name of the model, and the arguments of its factory if there are any; None if the file does not say."""
    described: bool = False
    """Whether the file says if and how its model was reduced, as ours do."""
    chosen: str | None = None
    """"weights" or "ema", of a file with several sets of weights."""


def read_weights(source: Source, *, weights_set: WeightsSet = "auto", model: nn.Module | None = None) -> Weights:
    """Reads a safetensors file (mapped into memory, not read whole), a torch file or a JAX archive.

    Args:
        source: a path, or an address as `find_weights` takes it.
        weights_set: which weights of a file with several sets.
        model: unreduced, into which timm reads archives (`.npz`); other files need none.

    Raises:
        UserError: the file is missing, damaged or holds something else, or a tensor holds what is no number.
    """
    file = find_weights(source)
    weights = _read(file, source, weights_set, model)
    for name, tensor in weights.tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
            raise UserError(f"weights {source}: {name} is no dense tensor of real numbers")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"weights {source}: {name} has NaN or infinite values: the run that wrote it has diverged")
    return weights


def _read(file: WeightsFile, source: Source, weights_set: WeightsSet, model: nn.Module | None) -> Weights:
    check_whole(file.path, source)
    if file.path.suffix not in (".safetensors", NPZ):
        plain = read_plain(file.path, source, weights_set)
        return Weights(plain.tensors, None, {}, plain.model or file.model, chosen=plain.chosen)
    if weights_set != "auto":
        raise no_such_set(source, weights_set, ONE_SET)
    if file.path.suffix == NPZ:
        if model is None:
            raise UserError(f"weights {source}: {NPZ} is read when a model is built: name it in create_model(weights=)")
        return Weights(read_npz(file.path, source, model), None, {}, file.model)
    try:
        with safe_open(file.path, framework="pt") as opened:
            strings = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            metadata = own_metadata(opened)
    except Exception as error:
        # The library does not limit the exceptions that a damaged or foreign file raises.
        raise _unreadable(source, error) from error
    stated = _stated_model(metadata) or file.model
    if METADATA_KEY not in strings:
        # safetensors' own `save_model` notes which names it left out for which.
        also = {alias: name for alias, name in strings.items() if name in tensors and alias not in tensors}
        tensors |= {alias: tensors[name] for alias, name in also.items()}
        return Weights(unwrapped(tensors, source), None, {}, stated)
    reduction = _reduction(source, metadata)
    return Weights(tensors, reduction, metadata.get("tied", {}), stated, described="reduction" in metadata)


def read_classes(source: Source) -> tuple[str, ...] | None:
    """The names of the classes that a file's classifier tells apart, or None if it does not say; reads no tensor.

    Raises:
        UserError: the file cannot be read.
    """
    file = find_weights(source)
    names = _read_metadata(file, source).get("classes")
    return file.classes if names is None else tuple(str(name) for name in names)


def _read_metadata(file: WeightsFile, source: Source) -> dict[str, Any]:
    if file.path.suffix != ".safetensors":
        return {}
    check_whole(file.path, source)
    try:
        with safe_open(file.path, framework="pt") as opened:
            return own_metadata(opened)
    except Exception as error:
        raise _unreadable(source, error) from error


def _unreadable(source: Source, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"weights {source}: cannot be read ({reason[:200]})")


def _stated_model(metadata: dict[str, Any]) -> str | None:
    """See `Weights.model`."""
    own = metadata.get("model")
    if not isinstance(own, dict) or "name" not in own:
        return None
    return " ".join([str(own["name"]), *(f"{key}={value}" for key, value in (own.get("kwargs") or {}).items())])


def _reduction(source: Source, metadata: dict[str, Any]) -> Reduction | None:
    if "reduction" not in metadata:
        return None
    try:
        reduction = parse_reduction(metadata["reduction"])
    except SettingError as error:
        raise UserError(f"weights {source}: made with an unknown reduction ({error})") from None
    return reduction if reduction.changes_model else None
