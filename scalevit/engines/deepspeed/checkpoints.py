"""DeepSpeed's own checkpoints, read without running code from them.

DeepSpeed 0.19.8 loads its files with `weights_only=False`, which runs whatever a pickle says. Here four harmless
classes of DeepSpeed's are allowed, and nothing else.
"""

import pickle
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalevit.errors import UserError


@dataclass
class Native:
    """What training goes on from: whole tensors, flat and fp32, by parameter name."""

    step: int
    optimizer_steps: int
    shapes: dict[str, torch.Size]
    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)


def is_deepspeed(path: Path) -> bool:
    """Whether a folder is one that DeepSpeed's `save_checkpoint` wrote, or a tag in it."""
    return _tag(path) is not None


def _tag(path: Path) -> Path | None:
    latest = path / "latest"
    try:
        tagged = path / latest.read_text().strip() if latest.is_file() else path
        return tagged if next(tagged.glob("*_model_states.pt"), None) else None
    except (OSError, ValueError):
        return None  # a `latest` that is no name


def read_deepspeed(path: Path, optimizer_names: Sequence[str]) -> Native:
    """Reads a checkpoint of any ZeRO stage and number of ranks, without tensor or pipeline parallelism.

    Args:
        optimizer_names: the parameters in the order in which the optimizer has them, which stage 0 does not write down.

    Raises:
        UserError: a file is missing, damaged, holds code, or is of a kind that is not known here.
    """
    folder = _tag(path)
    if folder is None:
        raise UserError(f"{path}: holds no checkpoint of DeepSpeed's")
    models = sorted(folder.glob("*_model_states.pt"))
    with _readable(folder):
        model = _load(models[0])
        optimizers = [_load(file)["optimizer_state_dict"] for file in _in_rank_order(folder)]
        if not isinstance(model["global_steps"], int) or model["global_steps"] < 0:
            raise ValueError(f"global_steps is {model['global_steps']!r}")
        stage = int(optimizers[0]["zero_stage"]) if optimizers else 0
        if stage == 0:
            return _read_replicated(model, optimizer_names)
        return (_read_partitioned if stage == 3 else _read_fragments)(model, optimizers)


def _in_rank_order(folder: Path) -> list[Path]:
    files = {
        int(f.name.split("zero_pp_rank_")[1].split("_")[0]): f for f in folder.glob("*zero_pp_rank_*_optim_states.pt")
    }
    if sorted(files) != list(range(len(files))):
        raise UserError(f"{folder}: the optimizer states of some ranks are missing, it has those of {sorted(files)}")
    return [files[rank] for rank in range(len(files))]


def _load(path: Path) -> dict[str, Any]:
    from scalevit.engines.deepspeed.engine import CLASSES_IN_CHECKPOINTS

    with torch.serialization.safe_globals(CLASSES_IN_CHECKPOINTS):
        return torch.load(path, map_location="cpu", weights_only=True)


# What torch.load raises on a damaged file, and we on one that is laid out otherwise.
_DAMAGED = (
    OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError, struct.error
)  # fmt: skip


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{folder}: a file holds more than tensors and was not loaded ({reason})") from None
    except _DAMAGED as error:
        raise UserError(
            f"{folder}: cannot be read as a checkpoint of DeepSpeed's ({type(error).__name__}: {error})"
        ) from error


def _read_replicated(model: dict[str, Any], names: Sequence[str]) -> Native:
    """Stage 0: the module's state dict, and the optimizer's as torch writes it."""
    state = model["optimizer"]["state"]
    if len(state) not in (0, len(names)):
        raise ValueError(f"an optimizer of {len(state)} parameters, the config's model has {len(names)}")
    weights = {name: model["module"][name].float() for name in names}
    moments: dict[str, dict[str, Tensor]] = {
        key: {name: state[index][key].flatten() for index, name in enumerate(names)} if state else {}
        for key in ("exp_avg", "exp_avg_sq")
    }
    return Native(
        step=model["global_steps"],
        optimizer_steps=int(state[0]["step"]) if state else 0,
        shapes={name: tensor.shape for name, tensor in weights.items()},
        weights={name: tensor.flatten() for name, tensor in weights.items()},
        **moments,
    )


def _read_fragments(model: dict[str, Any], ranks: list[dict[str, Any]]) -> Native:
    """Stages 1 and 2: each rank has a range of each group's flat buffer, and says which parameters are where in it."""
    native = _begin(model, _steps(ranks[0]["base_optimizer_state"], "state"))
    for group, shapes in enumerate(model["param_shapes"]):
        for name, shape in shapes.items():
            for key, kept in _kinds(native):
                parts = []
                for rank in ranks:
                    address = rank["param_slice_mappings"][group].get(name)
                    if address is not None:
                        flat = _flat(rank, "single_partition_of_fp32_groups", "base_optimizer_state", group, key)
                        parts.append(flat[address.start : address.start + address.numel])
                kept[name] = _join(name, parts, shape)
            native.shapes[name] = shape
    return native


def _read_partitioned(model: dict[str, Any], ranks: list[dict[str, Any]]) -> Native:
    """Stage 3: each rank has an equal part of every parameter, the last ones padded, one after another in a group."""
    native = _begin(model, _steps(ranks[0]["optimizer_state_dict"], "state"))
    for group, shapes in enumerate(model["param_shapes"]):
        start = 0
        for name, shape in shapes.items():
            numel = -(-shape.numel() // len(ranks))
            for key, kept in _kinds(native):
                flats = [_flat(rank, "fp32_flat_groups", "optimizer_state_dict", group, key) for rank in ranks]
                parts = [flat[start : start + numel] for flat in flats]
                kept[name] = _join(name, [torch.cat(parts)[: shape.numel()]], shape)
            native.shapes[name] = shape
            start += numel
    return native


def _begin(model: dict[str, Any], optimizer_steps: int) -> Native:
    return Native(step=model["global_steps"], optimizer_steps=optimizer_steps, shapes={}, weights={})


def _steps(optimizer: dict[str, Any], key: str) -> int:
    state = optimizer[key]
    first = state[min(state)] if state else {}
    return int(first.get("step", optimizer["param_groups"][0].get("step", 0)))


def _kinds(native: Native) -> list[tuple[str | None, dict[str, Tensor]]]:
    moments = [("exp_avg", native.exp_avg), ("exp_avg_sq", native.exp_avg_sq)] if native.optimizer_steps else []
    return [(None, native.weights), *moments]


def _flat(rank: dict[str, Any], weights: str, optimizer: str, group: int, key: str | None) -> Tensor:
    return rank[weights][group] if key is None else rank[optimizer]["state"][group][key]


def _join(name: str, parts: list[Tensor], shape: torch.Size) -> Tensor:
    whole = torch.cat([part.float() for part in parts])
    if whole.numel() != shape.numel():
        raise ValueError(f"{name} has {whole.numel()} elements instead of {shape.numel()}")
    return whole
