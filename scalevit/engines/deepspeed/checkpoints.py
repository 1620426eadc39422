"""DeepSpeed's own checkpoints, read without running code from them.

DeepSpeed 0.19.8 loads its files with `weights_only=False`, which runs whatever code a pickle contains. Here four
harmless classes of DeepSpeed are allowed, and nothing else.
"""

import pickle
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalevit.engines.deepspeed.file_keys import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    MODEL_FILE_SUFFIX,
    OPTIM_FILE_SUFFIX,
    OPTIMIZER_STATE_DICT,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
    ZERO_FILE_PREFIX,
    ZERO_STAGE,
)
from scalevit.engines.optimizer_access import ScalarCollector, group_scalars, kept_scalars, kept_tensors
from scalevit.engines.state import Scalar
from scalevit.errors import UserError


@dataclass
class DeepSpeedCheckpoint:
    """What training resumes from: whole tensors, flat, by parameter name."""

    step: int
    shapes: dict[str, torch.Size]
    weights: dict[str, Tensor]
    """In fp32."""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """The optimizer's, by tensor name and parameter name."""
    scalars: dict[str, dict[str, Scalar]] = field(default_factory=dict)
    """The optimizer's, by name and parameter name; as in `OptimizerState`."""


def is_deepspeed(path: Path) -> bool:
    """Whether a folder is one that DeepSpeed's `save_checkpoint` wrote, or a tag in it."""
    return _tag(path) is not None


def _tag(path: Path) -> Path | None:
    latest = path / "latest"
    try:
        tagged = path / latest.read_text().strip() if latest.is_file() else path
        return tagged if next(tagged.glob("*" + MODEL_FILE_SUFFIX), None) else None
    except (OSError, ValueError):
        return None  # `latest` does not contain a name


def read_deepspeed(path: Path, optimizer_names: Sequence[str], group_settings: Collection[str]) -> DeepSpeedCheckpoint:
    """Reads a checkpoint of any ZeRO stage and number of ranks, without tensor or pipeline parallelism.

    Args:
        optimizer_names: the parameters in the optimizer's order, which stage 0 does not record.
        group_settings: the keys of the optimizer's parameter groups before its first step: numbers under other keys are
            its state.

    Raises:
        UserError: a file is missing, damaged, contains code, or has a layout that is not known here.
    """
    folder = _tag(path)
    if folder is None:
        raise UserError(f"{path}: contains no DeepSpeed checkpoint")
    models = sorted(folder.glob("*" + MODEL_FILE_SUFFIX))
    with _readable(folder):
        model = _load(models[0])
        optimizers = [_load(file)[OPTIMIZER_STATE_DICT] for file in _in_rank_order(folder)]
        if not isinstance(model["global_steps"], int) or model["global_steps"] < 0:
            raise ValueError(f"global_steps is {model['global_steps']!r}")
        stage = int(optimizers[0][ZERO_STAGE]) if optimizers else 0
        if stage == 0:
            return _read_replicated(model, optimizer_names, group_settings)
        return (_read_partitioned if stage == 3 else _read_fragments)(model, optimizers, group_settings)


def _in_rank_order(folder: Path) -> list[Path]:
    files = {
        int(file.name.split(ZERO_FILE_PREFIX)[1].split("_")[0]): file
        for file in folder.glob(f"*{ZERO_FILE_PREFIX}*{OPTIM_FILE_SUFFIX}")
    }
    if sorted(files) != list(range(len(files))):
        raise UserError(
            f"{folder}: the optimizer states of some ranks are missing; found those of ranks {sorted(files)}"
        )
    return [files[rank] for rank in range(len(files))]


def _load(path: Path) -> dict[str, Any]:
    from scalevit.engines.deepspeed.internals import CLASSES_IN_CHECKPOINTS

    with torch.serialization.safe_globals(CLASSES_IN_CHECKPOINTS):
        return torch.load(path, map_location="cpu", weights_only=True)


# What torch.load raises on a damaged file, and this module on another layout.
_DAMAGED = (
    OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError, struct.error
)  # fmt: skip


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{folder}: a file contains more than tensors and was not loaded ({reason})") from None
    except _DAMAGED as error:
        raise UserError(
            f"{folder}: cannot be read as a DeepSpeed checkpoint ({type(error).__name__}: {error})"
        ) from error


def _read_replicated(model: dict[str, Any], names: Sequence[str], settings: Collection[str]) -> DeepSpeedCheckpoint:
    """Stage 0: the module's state dict, and the optimizer's as torch writes it."""
    optimizer = model["optimizer"]
    state = optimizer["state"]
    if len(state) not in (0, len(names)):
        raise ValueError(f"an optimizer of {len(state)} parameters, the config's model has {len(names)}")
    weights = {name: model["module"][name].float() for name in names}
    read = _begin(model)
    read.shapes = {name: tensor.shape for name, tensor in weights.items()}
    read.weights = {name: tensor.flatten() for name, tensor in weights.items()}
    collector = ScalarCollector()
    for group in optimizer["param_groups"]:
        for index in group["params"]:
            own = state.get(index, {})
            for key, value in kept_tensors(own).items():
                if value.shape != weights[names[index]].shape:
                    raise ValueError(f"{key} of {names[index]} has a shape of its own, which is not supported")
                read.tensors.setdefault(key, {})[names[index]] = value.flatten()
            collector.add([names[index]], kept_scalars(own), group_scalars(group, settings) if state else {})
    read.scalars = collector.scalars
    return read


@dataclass(frozen=True)
class _Layout:
    """Where the stages from 1 on keep what."""

    weights: str
    optimizer: str


_FRAGMENTS = _Layout(SINGLE_PARTITION_OF_FP32_GROUPS, BASE_OPTIMIZER_STATE)
_PARTITIONS = _Layout(FP32_FLAT_GROUPS, OPTIMIZER_STATE_DICT)


def _read_fragments(
    model: dict[str, Any], ranks: list[dict[str, Any]], settings: Collection[str]
) -> DeepSpeedCheckpoint:
    """Stages 1 and 2: each rank has a range of each group's flat buffer, and says which parameters are where in it."""
    read = _begin(model)
    for group, shapes in enumerate(model[PARAM_SHAPES]):
        for name, shape in shapes.items():
            for key, kept in _targets(read, ranks, _FRAGMENTS, group):
                parts = []
                for rank in ranks:
                    address = rank[PARAM_SLICE_MAPPINGS][group].get(name)
                    if address is not None:
                        flat = _flat(rank, _FRAGMENTS, group, key)
                        parts.append(flat[address.start : address.start + address.numel])
                kept[name] = _join(name, parts, shape)
            read.shapes[name] = shape
    _read_scalars(read, model, ranks[0][BASE_OPTIMIZER_STATE], settings)
    return read


def _read_partitioned(
    model: dict[str, Any], ranks: list[dict[str, Any]], settings: Collection[str]
) -> DeepSpeedCheckpoint:
    """Stage 3: each rank has an equal part of every parameter, the last ones padded, one after another in a group."""
    read = _begin(model)
    for group, shapes in enumerate(model[PARAM_SHAPES]):
        start = 0
        for name, shape in shapes.items():
            numel = -(-shape.numel() // len(ranks))
            for key, kept in _targets(read, ranks, _PARTITIONS, group):
                flats = [_flat(rank, _PARTITIONS, group, key) for rank in ranks]
                parts = [flat[start : start + numel] for flat in flats]
                kept[name] = _join(name, [torch.cat(parts)[: shape.numel()]], shape)
            read.shapes[name] = shape
            start += numel
    _read_scalars(read, model, ranks[0][OPTIMIZER_STATE_DICT], settings)
    return read


def _begin(model: dict[str, Any]) -> DeepSpeedCheckpoint:
    return DeepSpeedCheckpoint(step=model["global_steps"], shapes={}, weights={})


def _read_scalars(
    read: DeepSpeedCheckpoint, model: dict[str, Any], optimizer: dict[str, Any], settings: Collection[str]
) -> None:
    """The scalars of each group's flat buffer belong to all parameters in it."""
    collector = ScalarCollector()
    for group, shapes in enumerate(model[PARAM_SHAPES]):
        if own := optimizer["state"].get(group):
            collector.add(shapes, kept_scalars(own), group_scalars(optimizer["param_groups"][group], settings))
    read.scalars = collector.scalars


def _targets(
    read: DeepSpeedCheckpoint, ranks: list[dict[str, Any]], layout: _Layout, group: int
) -> list[tuple[str | None, dict[str, Tensor]]]:
    """What there is to read of a group: the weights (None) and the optimizer's tensors, each with its place."""
    state = ranks[0][layout.optimizer]["state"].get(group, {})
    return [(None, read.weights), *((key, read.tensors.setdefault(key, {})) for key in kept_tensors(state))]


def _flat(rank: dict[str, Any], layout: _Layout, group: int, key: str | None) -> Tensor:
    return rank[layout.weights][group] if key is None else rank[layout.optimizer]["state"][group][key]


def _join(name: str, parts: list[Tensor], shape: torch.Size) -> Tensor:
    whole = torch.cat(list(parts))
    if whole.numel() != shape.numel():
        raise ValueError(f"{name} has {whole.numel()} elements instead of {shape.numel()}")
    return whole
