"""`train.profile`: a trace and a memory snapshot of chosen training steps, on any engine, for every rank.

Knows torch's profiler and a folder. Must not know models, engines or data.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from scalevit.config.training import TrainConfig
from scalevit.distributed import World
from scalevit.errors import UserError

_MEMORY_EVENTS = 200_000  # the newest allocations that a snapshot keeps, about 100 MB


class Profiler:
    """Records `train.profile_steps` steps of this process, after its first `train.profile_after`.

    Writes into `folder/steps_A_B`, for each rank: `trace_rankN.json.gz` for Perfetto or chrome://tracing and, on CUDA,
    `memory_rankN.pickle` for https://docs.pytorch.org/memory_viz. Does nothing if `train.profile` is false.
    """

    def __init__(self, train: TrainConfig, folder: Path, world: World, *, first_step: int):
        self._enabled = train.profile
        self._steps = range(first_step + train.profile_after, first_step + train.profile_after + train.profile_steps)
        # A folder for each window, so that a resumed run keeps its earlier profiles.
        self._folder = folder / f"steps_{self._steps.start + 1}_{self._steps.stop}"
        self._world = world
        self._profile: profile | None = None
        self._recorded: list[int] = []

    def __enter__(self) -> "Profiler":
        """Collective if profiling is on.

        Raises:
            UserError: the folder cannot be written; reported before the first step.
        """
        if self._enabled:
            with self._world.collective_errors(), self._writing():
                self._folder.mkdir(parents=True, exist_ok=True)
                self._probe.touch()
                self._probe.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        if self._profile is not None:
            self._stop()
        if self._enabled and not self._recorded and self._world.is_first:
            with suppress(OSError):  # it contains an earlier profile of the same steps
                self._folder.rmdir()
            print(
                f"no profile was written: the run ended before step {self._steps.start + 1}, the first profiled one; "
                "lower train.profile_after",
                flush=True,
            )

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one optimizer step. Collective after the last profiled one."""
        if not self._enabled or step not in self._steps:
            yield
            return
        if self._profile is None:
            self._start()
        with record_function(f"step {step + 1}"):
            yield
        self._recorded.append(step + 1)
        if step == self._steps[-1]:
            self._stop()

    # --- helpers --------------------------------------------------------------------------------------------

    @property
    def _probe(self) -> Path:
        return self._folder / f".probe_rank{self._world.rank}"

    @property
    def _trace(self) -> Path:
        return self._folder / f"trace_rank{self._world.rank}.json.gz"

    @property
    def _on_cuda(self) -> bool:
        return self._world.device.type == "cuda"

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.start()

    def _stop(self) -> None:
        recorded, self._profile = self._profile, None
        assert recorded is not None
        recorded.stop()
        with self._world.collective_errors(), self._writing():
            recorded.export_chrome_trace(str(self._trace))
            if self._on_cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"memory_rank{self._world.rank}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
            elif self._world.is_first:
                (self._folder / "memory.txt").write_text(
                    "PyTorch records memory snapshots on CUDA devices only. The traces' [memory] events list every "
                    "CPU allocation of these steps.\n"
                )
        if self._world.is_first:
            print(f"profile of steps {self._recorded[0]} to {self._recorded[-1]}: {self._folder}", flush=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"profile folder {self._folder}: cannot be written ({error.strerror})") from None
