"""Profiles of one process; those of whole runs are in test_training.py."""

from pathlib import Path

import torch

from scalevit.config.training import TrainConfig
from scalevit.distributed import World
from scalevit.training.profiling import Profiler

ALONE = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))
SETTINGS = TrainConfig(profile=True, profile_after=1, profile_steps=1)


def steps(folder: Path, first: int, last: int) -> None:
    with Profiler(SETTINGS, folder, ALONE, first_step=first) as profiler:
        for step in range(first, last):
            with profiler.step(step):
                torch.ones(2).sum()


def test_a_run_that_goes_on_keeps_its_earlier_profiles(tmp_path: Path) -> None:
    steps(tmp_path, 0, 3)
    before = (tmp_path / "steps_2_2" / "trace_rank0.json.gz").read_bytes()
    steps(tmp_path, 3, 4)  # too short to be profiled
    steps(tmp_path, 0, 1)  # likewise, and of the same steps
    assert [path.name for path in tmp_path.iterdir()] == ["steps_2_2"]
    assert (tmp_path / "steps_2_2" / "trace_rank0.json.gz").read_bytes() == before
