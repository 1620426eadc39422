"""Resuming from a checkpoint, with any engine and any number of ranks. Knows slices and files."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalevit.checkpoint.folder import find_damage, quarantine, read_record
from scalevit.checkpoint.optimizer_record import state_scalars, state_tensors
from scalevit.checkpoint.run_state import RunState
from scalevit.checkpoint.tensors import read_slices
from scalevit.distributed import World
from scalevit.engines.base import Engine
from scalevit.engines.state import OptimizerState, TensorSlice
from scalevit.errors import UserError

_OPTIMIZER = "optimizer."


def newest_intact(candidates: Sequence[Path], world: World) -> Path:
    """The first checkpoint that is intact; those before it are quarantined with a warning. Collective; each rank checks
    a part of the files.

    Args:
        candidates: checkpoints, the newest first.

    Raises:
        UserError: all are damaged, or a damaged one cannot be renamed.
    """
    for checkpoint in candidates:
        problems = world.gather(find_damage(checkpoint, reader=world.rank, readers=world.size))
        if not problems:
            return checkpoint
        with world.collective_errors():
            if world.is_first:
                _quarantine(checkpoint, problems[0])
    folder = candidates[0].parent
    raise UserError(f"{folder}: every checkpoint is damaged; remove {folder.parent} to start again")


def _quarantine(checkpoint: Path, problem: str) -> None:
    try:
        renamed = quarantine(checkpoint)
    except OSError as error:
        raise UserError(f"checkpoint {checkpoint}: {problem}; it cannot be renamed ({error.strerror})") from None
    print(f"warning: checkpoint {checkpoint}: {problem}; renamed to {renamed.name}", file=sys.stderr, flush=True)


def restore(
    checkpoint: Path, engine: Engine, ema: Mapping[str, Tensor] | None, *, kept: Sequence[str] = ()
) -> RunState:
    """Restores weights, optimizer state, EMA and loss scale. Collective.

    Args:
        ema: averaged weights, laid out like the engine's local parameters; filled with the weights if the checkpoint
            has no EMA.
        kept: names of the tensors that the run's optimizer expects to find in its state.

    Raises:
        UserError: the checkpoint belongs to another model or optimizer, was written by another version of scalevit, or
            cannot be read.
    """
    record = read_record(checkpoint)
    local = engine.local_parameters()
    weights = engine.slices(local)
    check_shapes(checkpoint, record["tensors"], weights)
    try:
        state = RunState.from_record(record["state"])
        described = state_tensors(record["optimizer"], {name: own.shape for name, own in weights.items()})
        optimizer = str(record["optimizer"]["name"])
        scalars = state_scalars(record["optimizer"], weights)
        scale = {key: record["loss_scale"][key] for key in ("value", "grown_steps", "enabled")}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"checkpoint {checkpoint}: was written by another version of scalevit ({error})") from None
    if described or scalars:  # else it keeps nothing, and any optimizer may follow
        _check_optimizer(checkpoint, optimizer, described, type(engine.optimizer).__name__, kept)
    parts = {"weights": _empty(weights)}
    parts |= {_OPTIMIZER + name: slices for name, slices in engine.optimizer_state_layout(described).items()}
    if ema is not None and "ema" in record["parts"]:
        parts["ema"] = _empty(engine.slices(ema))
    with engine.world.collective_errors():
        read_parts(checkpoint, parts)
    with torch.no_grad():
        _copy(weights, parts["weights"])
        if ema is not None:
            _copy(engine.slices(ema), parts.get("ema", parts["weights"]))
    engine.commit_parameters()
    tensors = {part.removeprefix(_OPTIMIZER): own for part, own in parts.items() if part.startswith(_OPTIMIZER)}
    engine.load_optimizer_state(OptimizerState(optimizer, tensors, scalars))
    if engine.loss_scale.enabled and scale["enabled"]:
        engine.loss_scale.value, engine.loss_scale.grown_steps = scale["value"], scale["grown_steps"]
    return state


def read_parts(checkpoint: Path, parts: Mapping[str, Mapping[str, TensorSlice]]) -> None:
    """Fills slices of each part's tensors from a checkpoint's files. Not collective.

    Args:
        parts: "weights", "ema" and "optimizer.NAME", by tensor name; on the CPU.

    Raises:
        UserError: a file cannot be read, or lacks something.
    """
    read_slices(checkpoint, {f"{part}.{name}": own for part, slices in parts.items() for name, own in slices.items()})


def check_shapes(checkpoint: Path, saved: dict[str, Any], slices: Mapping[str, TensorSlice]) -> None:
    """Makes sure that a checkpoint and a model have the same parameters.

    Args:
        saved: shapes by name, the record's `tensors`.
        slices: the model's, by name.

    Raises:
        UserError: one of them has a parameter that the other lacks, or one of another shape.
    """
    own = {name: list(part.shape) for name, part in slices.items()}
    for name in sorted(saved.keys() | own.keys()):
        there, here = saved.get(name), own.get(name)
        if there != here:
            raise UserError(
                f"checkpoint {checkpoint}: belongs to another model ({name} is {there or 'not'} there, "
                f"{here or 'not'} here)"
            )


def _check_optimizer(checkpoint: Path, saved: str, tensors: Iterable[str], own: str, kept: Iterable[str]) -> None:
    """Makes sure that a checkpoint has what a run's optimizer continues from.

    Args:
        saved: class of the checkpoint's optimizer.
        tensors: names of those in its state.
        own: class of the run's optimizer.
        kept: names of the tensors that it expects.

    Raises:
        UserError: it is another optimizer, or one whose arguments make it keep more.
    """
    if saved != own:
        raise UserError(f"checkpoint {checkpoint}: contains the state of optimizer {saved}, this run uses {own}")
    present = set(tensors)
    if missing := [name for name in kept if name not in present]:
        raise UserError(
            f"checkpoint {checkpoint}: contains no {missing[0]}, which this run's {own} keeps: "
            "give it the arguments that it had, or start another run"
        )


def _empty(slices: Mapping[str, TensorSlice]) -> dict[str, TensorSlice]:
    return {name: own.empty_like() for name, own in slices.items()}


def _copy(targets: Mapping[str, TensorSlice], sources: Mapping[str, TensorSlice]) -> None:
    for name, target in targets.items():
        target.values.copy_(sources[name].values)
