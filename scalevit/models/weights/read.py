"""Reads weights files: ours (safetensors with metadata) and plain state dicts. Never executes what it reads."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from scalevit.errors import SettingError, UserError
from scalevit.models.reductions.apply import parse_reduction
from scalevit.models.reductions.base import Reduction

METADATA_KEY = "scalevit"
"""Of the JSON object that our files carry in their safetensors metadata: `model`, `reduction`, `tied`, `classes`."""


@dataclass(frozen=True)
class Weights:
    """The content of a weights file."""

    tensors: dict[str, Tensor]
    reduction: Reduction | None
    """That made the model; None for weights of an unreduced one, as those of other tools are."""
    tied: dict[str, str]
    """Further name of a shared tensor -> the name that it is stored under."""
    model: str | None
    """timm's name of the model, and the arguments of its factory if there are any; None if the file does not say."""


def read_weights(path: Path) -> Weights:
    """Reads a safetensors file (mapped into memory, not read whole) or a torch file.

    A torch file must hold a state dict, or a dict with one under `state_dict`, `model` or `state_dict_ema`.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    if not path.is_file():
        raise UserError(f"weights {path}: no such file")
    metadata: dict[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = _our_metadata(file)
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Neither library limits the exceptions that a damaged or foreign file raises.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to load it with `weights_only=False`
            reason = "it is damaged, or contains more than tensors: save model.state_dict()"
        raise UserError(f"weights {path}: cannot be read ({reason})") from error
    model = _stated_model(content, metadata)
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"weights {path}: holds no state dict")
    return Weights(content, _reduction(path, metadata), metadata.get("tied", {}), model)


def is_reduced(path: Path) -> bool:
    """Whether a file says that its weights are those of a reduced model; reads no tensor.

    Raises:
        UserError: the file cannot be read, or its reduction is unknown.
    """
    return _reduction(path, _read_metadata(path)) is not None


def read_classes(path: Path) -> tuple[str, ...] | None:
    """The names of the classes that a file's classifier tells apart, or None if it does not say; reads no tensor.

    Raises:
        UserError: the file cannot be read.
    """
    names = _read_metadata(path).get("classes")
    return None if names is None else tuple(str(name) for name in names)


def _read_metadata(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return {}
    if not path.is_file():
        raise UserError(f"weights {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return _our_metadata(file)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"weights {path}: cannot be read ({reason[:200]})") from error


def _our_metadata(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))


def _stated_model(content: Any, metadata: dict[str, Any]) -> str | None:
    """See `Weights.model`: from our metadata, or from what timm's train.py saves beside the weights."""
    if isinstance(content, dict) and isinstance(content.get("arch"), str):
        return content["arch"]
    own = metadata.get("model")
    if not isinstance(own, dict) or "name" not in own:
        return None
    return " ".join([own["name"], *(f"{key}={value}" for key, value in own.get("kwargs", {}).items())])


def _reduction(path: Path, metadata: dict[str, Any]) -> Reduction | None:
    if "reduction" not in metadata:
        return None
    try:
        reduction = parse_reduction(metadata["reduction"])
    except SettingError as error:
        raise UserError(f"weights {path}: made with an unknown reduction ({error})") from None
    return reduction if reduction.changes_model else None
