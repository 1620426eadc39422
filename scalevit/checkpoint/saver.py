"""Saving while training goes on: a copy is taken at once, a thread of each rank writes it."""

import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch.distributed as dist

from scalevit.checkpoint.folder import clean_up, commit, digest, lock, point_and_prune, temporary_path
from scalevit.checkpoint.run_state import RunState
from scalevit.checkpoint.tensors import file_of, write_pieces
from scalevit.config.training import CheckpointConfig
from scalevit.distributed import World
from scalevit.engines.base import Engine
from scalevit.engines.state import Piece
from scalevit.errors import UserError
from scalevit.training.ema import Ema

Result = TypeVar("Result")


class Saver:
    """Writes the checkpoints of one run. All ranks build one and call the same methods."""

    def __init__(self, folder: Path, world: World, config: CheckpointConfig):
        """Takes the folder for this run and clears away what a killed one left half-written. Collective.

        Raises:
            UserError: another run uses it, it cannot be written, or the ranks do not share it; on every rank.
        """
        self._folder, self._world, self._config = folder, world, config
        # The threads talk while the training does, so over a group of their own; theirs are small things, on CPUs.
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._writing: Future[None] | None = None
        self._lock: BinaryIO | None = None
        probe = folder / self._together(self._take if world.is_first else lambda: "")[0]
        seen = self._together(probe.exists)
        if world.is_first:
            probe.unlink()
        if not all(seen):
            raise UserError(
                f"{folder}: rank {seen.index(False)} does not see what rank 0 wrote; output_dir must be one folder "
                "that all nodes share"
            )

    def _take(self) -> str:
        """Returns the name of a file by which the other ranks tell that it is this folder that they see."""
        self._lock = lock(self._folder)
        clean_up(self._folder)
        probe = self._folder / f".probe-{secrets.token_hex(8)}"
        probe.touch()
        return probe.name

    def save(
        self, engine: Engine, ema: Ema | None, state: RunState, about: Mapping[str, Any], score: float | None
    ) -> None:
        """Copies the state of a run and has it written as `step-NNNNNNNN`. Waits for the save before. Collective.

        Args:
            about: what a resumed run is compared with: "config" and "data", the loader's fingerprint.
            score: the accuracy of just these weights, where they were evaluated; the best one's checkpoint is kept.

        Raises:
            UserError: this save (where not asynchronous) or the one before failed; on every rank.
        """
        self.wait()
        weights = engine.pieces(engine.local_parameters())
        moments = engine.moments()
        parts = {"weights": weights, "exp_avg": moments.exp_avg, "exp_avg_sq": moments.exp_avg_sq}
        if ema is not None:
            parts["ema"] = engine.pieces(ema.tensors)
        copies = {f"{part}.{name}": _copy(piece) for part, held in parts.items() for name, piece in held.items()}
        record = {
            "state": asdict(state),
            "score": score,
            "optimizer_steps": moments.steps,
            "loss_scale": asdict(engine.loss_scale),
            **about,
            "tensors": {name: list(piece.shape) for name, piece in weights.items()},
            "parts": sorted(parts),
            "tied": engine.tied,
            "world_size": self._world.size,
            "versions": versions(),
        }
        self._writing = _in_thread(partial(self.write, state.step, copies, record))
        if not self._config.asynchronous:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether the save under way is known to have failed; `wait` then tells why. Not collective."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Until the last save is on the disk. Collective.

        Raises:
            UserError: the disk is full or the folder cannot be written; on every rank.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    # --- in the threads -------------------------------------------------------------------------------------

    def write(self, step: int, pieces: Mapping[str, Piece], record: Mapping[str, Any]) -> None:
        """Writes a checkpoint and returns when it is on the disk. Collective.

        Args:
            pieces: by "part.name", on the CPU; those of all ranks together are each tensor once.

        Raises:
            UserError: the disk is full or the folder cannot be written; on every rank.
        """
        temporary = temporary_path(self._folder, step)
        try:
            self._on_first(lambda: temporary.mkdir(parents=True))
            digests = self._together(lambda: self._write_own(temporary, pieces))
            files = {file_of(rank): entry for rank, entry in enumerate(digests) if entry is not None}
            self._on_first(lambda: commit(self._folder, step, record, files))
        except UserError:
            if self._world.is_first:  # on a full disk the half that was written is in the way
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        keep = partial(point_and_prune, keep=self._config.keep, keep_best=self._config.keep_best)
        self._on_first(lambda: keep(self._folder))

    def _write_own(self, folder: Path, pieces: Mapping[str, Piece]) -> dict[str, Any] | None:
        """This rank's file; what the manifest says of it, None where the rank holds nothing."""
        write_pieces(folder, pieces, rank=self._world.rank)
        own = folder / file_of(self._world.rank)
        return digest(own) if own.exists() else None

    def _on_first(self, action: Callable[[], None]) -> None:
        """Has rank 0 do what only one may do; the others wait for it."""
        self._together(action if self._world.is_first else lambda: None)

    def _together(self, action: Callable[[], Result]) -> list[Result]:
        """Every rank's result, or one rank's error on all of them, so that none waits for one that is gone."""
        result: Result | None = None
        problem: Exception | None = None
        try:
            result = action()
        except Exception as error:
            problem = error  # raised below, when all ranks know
        told = None
        if isinstance(problem, OSError):
            told = f"checkpoint {self._folder}: cannot be written ({problem})"
        elif problem is not None:
            told = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
        outcomes = [(result, told)] * self._world.size
        if self._group is not None:
            dist.all_gather_object(outcomes, (result, told), group=self._group)
        if problem is not None and not isinstance(problem, OSError | UserError):
            raise problem
        for _, message in outcomes:
            if message is not None:
                raise UserError(message)
        return [result for result, _ in outcomes]  # type: ignore[misc]


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    return {name: version(name) for name in ("scalevit", "torch", "timm", "deepspeed")}


def _copy(piece: Piece) -> Piece:
    """This rank's share of a piece, which training no longer changes."""
    share = piece.share()
    return Piece(share.values.to("cpu", copy=True), share.start, share.shape)


def _in_thread(action: Callable[[], None]) -> "Future[None]":
    """A daemon: a rank that must leave at once does not wait for peers that are gone, as pool threads would."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            action()
        except BaseException as error:
            future.set_exception(error)  # raised again in Saver.wait
        else:
            future.set_result(None)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future
