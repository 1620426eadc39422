"""Timing of GPU work for the tuner and the benchmark: events, rotated inputs, percentiles, the environment.

On a CPU it uses the wall clock; that is for tests of the callers, not for results. Must not know what is timed.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: 20th, 50th and 80th percentile of `calls` calls."""

    p20: float
    p50: float
    p80: float
    calls: int


def environment(device: torch.device, command: str) -> dict[str, object]:
    """What a result must be stored with: device, versions, date and command."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    date = datetime.datetime.now().isoformat(timespec="seconds")
    return {
        "device": name, "torch": torch.__version__, "triton": triton.__version__, "date": date, "command": command
    }  # fmt: skip


def cold_cache_copies(bytes_each: int, device: torch.device) -> int:
    """How many copies of the inputs to rotate so that none is still in the L2 cache when it is used again."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(8, -(-3 * cache // max(bytes_each, 1))))


def time_calls(
    calls: Sequence[Callable[[], object]], device: torch.device, *, seconds: float = 0.3, at_least: int = 10
) -> Timing:
    """Times the calls in rotation for about `seconds`, after two warm-up calls of each (which also compile)."""
    for call in calls:
        call()
        call()
    if device.type == "cpu":
        measured = [_wall(calls[i % len(calls)]) for i in range(at_least)]
    else:
        torch.cuda.synchronize(device)
        once = _events(calls, len(calls))
        rounds = max(at_least, min(2000, int(seconds * 1e6 / max(sorted(once)[len(once) // 2], 1.0))))
        measured = _events(calls, rounds)
    values = torch.tensor(measured, dtype=torch.float64)
    p20, p50, p80 = torch.quantile(values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(p20, p50, p80, len(measured))


def _events(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for i, (start, end) in enumerate(pairs):
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def _wall(call: Callable[[], object]) -> float:
    before = time.perf_counter()
    call()
    return (time.perf_counter() - before) * 1e6
