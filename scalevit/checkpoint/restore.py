"""Going on from a checkpoint, with any engine and any number of ranks."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from scalevit.checkpoint.folder import find_damage, read_record, set_aside
from scalevit.checkpoint.run_state import RunState
from scalevit.checkpoint.tensors import read_pieces
from scalevit.distributed import World
from scalevit.engines.base import Engine
from scalevit.engines.state import Moments, Piece
from scalevit.errors import UserError
from scalevit.training.ema import Ema


def newest_whole(candidates: Sequence[Path], world: World) -> Path:
    """The first that is undamaged; those before it are set aside with a warning. Collective; each rank checks a part.

    Args:
        candidates: checkpoints, the newest first.

    Raises:
        UserError: all are damaged, or a damaged one cannot be renamed.
    """
    for checkpoint in candidates:
        problems = world.gather(find_damage(checkpoint, reader=world.rank, readers=world.size))
        if not problems:
            return checkpoint
        with world.agreeing_on_errors():
            if world.is_first:
                _set_aside(checkpoint, problems[0])
    folder = candidates[0].parent
    raise UserError(f"{folder}: every checkpoint is damaged; remove {folder.parent} to start anew")


def _set_aside(checkpoint: Path, problem: str) -> None:
    try:
        aside = set_aside(checkpoint)
    except OSError as error:
        raise UserError(f"checkpoint {checkpoint}: {problem}; it cannot be renamed ({error.strerror})") from None
    print(f"warning: checkpoint {checkpoint}: {problem}; set aside as {aside.name}", file=sys.stderr, flush=True)


def restore(checkpoint: Path, engine: Engine, ema: Ema | None) -> RunState:
    """Puts weights, moments, EMA and loss scale back. Collective.

    An EMA that the checkpoint lacks starts at its weights.

    Raises:
        UserError: the checkpoint is of another model, or cannot be read.
    """
    record = read_record(checkpoint)
    local = engine.local_parameters()
    _check_shapes(checkpoint, record["tensors"], engine.pieces(local))
    parts = {"weights": engine.pieces(local)}
    if ema is not None:
        parts["ema"] = engine.pieces(ema.tensors)
    if record["optimizer_steps"]:
        parts |= {"exp_avg": engine.moment_pieces(), "exp_avg_sq": engine.moment_pieces()}
    with engine.world.agreeing_on_errors():
        read = read_parts(checkpoint, {part: pieces for part, pieces in parts.items() if part in record["parts"]})
    with torch.no_grad():
        for name, piece in parts["weights"].items():
            piece.values.copy_(read["weights"][name].values)
        for name, piece in parts.get("ema", {}).items():
            piece.values.copy_(read.get("ema", read["weights"])[name].values)
    engine.adopt_weights()
    engine.load_moments(Moments(record["optimizer_steps"], read.get("exp_avg", {}), read.get("exp_avg_sq", {})))
    scale = record["loss_scale"]
    if engine.loss_scale.enabled and scale["enabled"]:
        engine.loss_scale.value, engine.loss_scale.grown_steps = scale["value"], scale["grown_steps"]
    return RunState(**record["state"])


def read_parts(checkpoint: Path, parts: dict[str, dict[str, Piece]]) -> dict[str, dict[str, Piece]]:
    """The same ranges of each part's tensors, on the CPU. Not collective.

    Args:
        parts: what to read of "weights", "ema", "exp_avg", "exp_avg_sq", by tensor name.

    Raises:
        UserError: a file cannot be read, or lacks something.
    """
    read = {part: {name: piece.empty_like() for name, piece in pieces.items()} for part, pieces in parts.items()}
    flat = {f"{part}.{name}": piece for part, pieces in read.items() for name, piece in pieces.items()}
    read_pieces(checkpoint, flat)
    return read


def _check_shapes(checkpoint: Path, saved: dict[str, list[int]], pieces: dict[str, Piece]) -> None:
    own = {name: list(piece.shape) for name, piece in pieces.items()}
    for name in sorted(saved.keys() | own.keys()):
        there, here = saved.get(name), own.get(name)
        if there != here:
            raise UserError(
                f"checkpoint {checkpoint}: is of another model ({name} is {there or 'not'} there, {here or 'not'} here)"
            )
