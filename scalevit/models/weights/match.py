"""Weights as files: canonical names saved once, tying restored at load, never reduced twice.

A shared MLP appears in a plain `state_dict` once per block that uses it (152 keys for 128 parameters in a
grouped ViT-B/16), which safetensors refuses. Here every tensor has one name, the first, and the file's
metadata lists the other names and the reduction that made the model.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.mlps import reduce_model
from scalevit.models.reductions.base import Reduction
from scalevit.tying import tied_names

_METADATA_KEY = "scalevit"


def canonical_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each shared tensor under its canonical name only."""
    tied = tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def save_weights(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    model: ModelConfig,
    reduction: Reduction,
    tied: Mapping[str, str],
) -> None:
    """Writes one safetensors file, whole or not at all.

    Args:
        tensors: by canonical name, on the CPU.
        tied: further name -> canonical name.

    Raises:
        UserError: the file cannot be written.
    """
    description = {
        "model": model.model_dump(mode="json", exclude={"initial_weights"}),
        "reduction": reduction.model_dump(mode="json"),
        "tied": dict(tied),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, temporary, metadata={"format": "pt", _METADATA_KEY: json.dumps(description)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path}: cannot be written ({error})") from None


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and what our metadata says of them ({} for a file of another maker).

    Reads safetensors, or a torch file without unpickling code (a state dict, or one under `state_dict`,
    `model` or `state_dict_ema`).

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    if not path.is_file():
        raise UserError(f"weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
                return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no mapping)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A file that is none of these fails anywhere in torch's unpickler.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"weights {path}: cannot be read ({reason[:200]})") from error
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"weights {path}: holds no state dict")
    return content, {}


def load_initial_weights(model: nn.Module, source: str, reduction: Reduction) -> bool:
    """Loads weights into an unreduced model; reduces it first where the file's weights are reduced already.

    Returns:
        Whether the model is reduced now.

    Raises:
        UserError: as `fitting_weights`.
    """
    tensors, already_reduced = fitting_weights(model, source, reduction)
    with torch.no_grad():
        for name, tensor in canonical_state(model).items():
            if name in tensors and tensor.device.type != "meta":
                tensor.copy_(tensors[name])
    return already_reduced


def fitting_weights(model: nn.Module, source: str, reduction: Reduction) -> tuple[dict[str, Tensor], bool]:
    """Reads weights for an unreduced model, and reduces it where they are reduced already.

    Plain weights (of timm, or a run without reduction) fit the model as it is; the caller then reduces it. Position
    embeddings and patch filters of another size are resampled as timm does. A classifier for another number of
    classes is left out: it keeps its initialisation.

    Returns:
        Tensors by canonical name, and whether they, and the model now, are reduced.

    Raises:
        UserError: the file's reduction is not the config's, or its tensors do not fit.
    """
    tensors, metadata = read_weights(Path(source))
    made_by = metadata.get("reduction", {"strategy": "none"})
    already_reduced = made_by["strategy"] != "none"
    if already_reduced:
        _check_same_reduction(source, made_by, reduction)
        reduce_model(model, reduction)
    else:
        tensors = checkpoint_filter_fn(tensors, model)  # type: ignore[arg-type]

    own = canonical_state(model)
    head = {name for name in own if name.startswith(("head.", "head_dist."))}
    fresh = {name for name in head if name in tensors and tensors[name].shape[:1] != own[name].shape[:1]}
    missing = sorted(own.keys() - tensors.keys() - fresh)
    unknown = sorted(tensors.keys() - own.keys() - tied_names(model).keys())
    ill_shaped = [n for n in own.keys() & tensors.keys() - fresh if own[n].shape != tensors[n].shape]
    for problem, names in (
        ("lacks", missing),
        ("has the unknown", unknown),
        ("does not fit in the shape of", ill_shaped),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"weights {source}: {problem} {sorted(names)[0]}{more} of this model")
    return {name: tensors[name] for name in own if name not in fresh}, already_reduced


def _check_same_reduction(source: str, made_by: dict[str, Any], reduction: Reduction) -> None:
    """The structure must agree; `scale` and `select_units` act at initialisation only."""
    at_initialisation = {"scale", "select_units"}
    wanted = {key: value for key, value in reduction.model_dump(mode="json").items() if key not in at_initialisation}
    found = {key: value for key, value in made_by.items() if key not in at_initialisation}
    if wanted != found:
        raise UserError(
            f"weights {source}: made with reduction {json.dumps(found)}, the config says {json.dumps(wanted)}"
        )
