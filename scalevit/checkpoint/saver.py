"""Saving beside training: the state is copied at once, and a thread of each rank writes it. Knows slices and files."""

import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch.distributed as dist
from torch import Tensor

from scalevit.checkpoint.folder import (
    best_checkpoint,
    clean_up,
    commit,
    digest,
    list_checkpoints,
    lock,
    prune,
    temporary_path,
    update_pointers,
)
from scalevit.checkpoint.optimizer_record import to_record
from scalevit.checkpoint.run_state import RunState
from scalevit.checkpoint.tensors import file_of, write_slices
from scalevit.config.training import CheckpointConfig
from scalevit.distributed import World
from scalevit.engines.base import Engine
from scalevit.engines.state import TensorSlice
from scalevit.errors import UserError
from scalevit.runs.environment import package_versions

Result = TypeVar("Result")


class Saver:
    """Writes the checkpoints of one run. All ranks build one and call the same methods."""

    def __init__(self, folder: Path, world: World, config: CheckpointConfig):
        """Locks the checkpoint folder and removes incomplete checkpoints of an interrupted run. Collective.

        Raises:
            UserError: another run uses it, it cannot be written, or the ranks do not share it; on every rank.
        """
        self._folder, self._world, self._config = folder, world, config
        # The threads communicate at the same time as the training, so they have a group of their own, on CPUs.
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._writing: Future[None] | None = None
        self._lock: BinaryIO | None = None
        probe = folder / self._gather_results(self._acquire_folder if world.is_first else lambda: "")[0]
        seen = self._gather_results(probe.exists)
        if world.is_first:
            probe.unlink()
        if not all(seen):
            raise UserError(
                f"{folder}: rank {seen.index(False)} does not see what rank 0 wrote; output_dir must be one folder "
                "that all nodes share"
            )

    def _acquire_folder(self) -> str:
        """Returns the name of a file by which the other ranks check that they see the same folder."""
        self._lock = lock(self._folder)
        clean_up(self._folder)
        probe = self._folder / f".probe-{secrets.token_hex(8)}"
        probe.touch()
        return probe.name

    def save(
        self,
        engine: Engine,
        ema: Mapping[str, Tensor] | None,
        state: RunState,
        about: Mapping[str, Any],
        score: float | None,
    ) -> None:
        """Copies the state of a run and has it written as `step-NNNNNNNN`. Waits for the previous save. Collective.

        Args:
            ema: averaged weights, laid out like the engine's local parameters.
            about: what a resumed run is compared with: "config", "data", the loader's fingerprint, and "classes", the
                names of the labels, if they are known.
            score: the accuracy of exactly these weights, if they were evaluated; the best one's checkpoint is kept.

        Raises:
            UserError: this save (if not asynchronous) or the previous one failed; on every rank.
        """
        self.wait()
        weights = engine.slices(engine.local_parameters())
        optimizer = engine.optimizer_state()
        parts: dict[str, Mapping[str, TensorSlice]] = {"weights": weights}
        parts |= {f"optimizer.{name}": slices for name, slices in optimizer.tensors.items()}
        if ema is not None:
            parts["ema"] = engine.slices(ema)
        copies = {f"{part}.{name}": _copy(own) for part, held in parts.items() for name, own in held.items()}
        shapes = {name: own.shape for name, own in weights.items()}
        record = {
            "state": asdict(state),
            "score": score,
            "optimizer": to_record(optimizer, shapes),
            "loss_scale": asdict(engine.loss_scale),
            **about,
            "tensors": {name: list(shape) for name, shape in shapes.items()},
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
        """Whether the save in progress is known to have failed; `wait` then raises the reason. Not collective."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Waits until the last save is written to disk. Collective.

        Raises:
            UserError: the disk is full or the folder cannot be written; on every rank.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    # --- in the threads -------------------------------------------------------------------------------------

    def write(self, step: int, slices: Mapping[str, TensorSlice], record: Mapping[str, Any]) -> None:
        """Writes a checkpoint and returns when it is flushed to disk. Collective.

        Args:
            slices: by "part.name", on the CPU; those of all ranks together hold each element once.

        Raises:
            UserError: the disk is full or the folder cannot be written; on every rank.
        """
        temporary = temporary_path(self._folder, step)
        try:
            self._on_rank_zero(lambda: temporary.mkdir(parents=True))
            digests = self._gather_results(lambda: self._write_own(temporary, slices))
            files = {file_of(rank): entry for rank, entry in enumerate(digests) if entry is not None}
            self._on_rank_zero(lambda: commit(self._folder, step, record, files))
        except UserError:
            if self._world.is_first:  # on a full disk what was written takes the space
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._on_rank_zero(self._tidy)

    def _tidy(self) -> None:
        """Moves `latest` and `best`, and removes the checkpoints that are not to be kept."""
        kept = list_checkpoints(self._folder)[-self._config.keep :]
        best = best_checkpoint(self._folder)
        if best is not None and self._config.keep_best:
            kept.append(best)
        update_pointers(self._folder, best=best if best in kept else None)
        prune(self._folder, kept)

    def _write_own(self, folder: Path, slices: Mapping[str, TensorSlice]) -> dict[str, Any] | None:
        """Writes this rank's file; returns its entry of the manifest, None if the rank holds nothing."""
        write_slices(folder, slices, rank=self._world.rank)
        own = folder / file_of(self._world.rank)
        return digest(own) if own.exists() else None

    def _on_rank_zero(self, action: Callable[[], None]) -> None:
        """Runs an action on rank 0; the others wait for it."""
        self._gather_results(action if self._world.is_first else lambda: None)

    def _gather_results(self, action: Callable[[], Result]) -> list[Result]:
        """Every rank's result, or one rank's error on all of them, so that none waits for a rank that has ended."""
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
    """Versions of what wrote a checkpoint; packages that are not installed are left out."""
    found = package_versions(("scalevit", "torch", "timm", "deepspeed"))
    return {name: version for name, version in found.items() if version is not None}


def _copy(own: TensorSlice) -> TensorSlice:
    """What this rank writes of a slice, in memory that training does not change."""
    part = own.written_part()
    return TensorSlice(part.values.to("cpu", copy=True), part.start, part.shape)


def _in_thread(action: Callable[[], None]) -> "Future[None]":
    """Runs an action in a daemon thread: a rank that must exit does not wait for it, as it would for a pool's."""
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
