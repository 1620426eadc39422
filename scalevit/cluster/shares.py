"""Divides the cores and GPUs of this machine among processes that run beside each other. Must not import torch."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from scalevit.errors import UserError

# Which GPUs a process sees; ROCm's torch reads the first too.
VISIBLE = "CUDA_VISIBLE_DEVICES"
_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


@dataclass(frozen=True)
class Share:
    """What one of several processes gets."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] | None
    """As named in `VISIBLE`; None leaves it as it is."""

    def environment(self) -> dict[str, str]:
        """Variables for its process. The cores it inherits: torch and OpenMP take as many threads as it has cores."""
        return {} if self.gpus is None else {VISIBLE: ",".join(self.gpus)}


def divide(count: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Share]:
    """Shares of about equal size; the first ones get what is left over.

    With fewer GPUs than processes, several processes share a GPU.

    Args:
        count: of processes.
        cores: numbers of this machine's cores.
        gpus: their names; none on a machine without.

    Raises:
        UserError: there are fewer cores than processes.
    """
    if count > len(cores):
        raise UserError(f"--parallel {count}: there are only {len(cores)} cores; a run needs at least one")
    own_cores = _parts(cores, count)
    if not gpus:
        own_gpus: list[tuple[str, ...] | None] = [None] * count
    elif count > len(gpus):
        own_gpus = [(gpus[number % len(gpus)],) for number in range(count)]
    else:
        own_gpus = [tuple(part) for part in _parts(gpus, count)]
    return [Share(tuple(part), names) for part, names in zip(own_cores, own_gpus, strict=True)]


def _parts(items: Sequence, count: int) -> list[Sequence]:
    size, rest = divmod(len(items), count)
    ends = [number * size + min(number, rest) for number in range(count + 1)]
    return [items[first:last] for first, last in pairwise(ends)]


def visible_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that a process started from here sees, as named in `VISIBLE`.

    Without that variable another process counts them by torch, which takes seconds and this one does without.
    """
    if VISIBLE in environment:
        return [name.strip() for name in environment[VISIBLE].split(",") if name.strip() not in ("", "-1")]
    if not any(Path(file).exists() for file in _GPU_FILES):
        return []
    program = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return [str(number) for number in range(int(done.stdout))] if done.returncode == 0 else []
