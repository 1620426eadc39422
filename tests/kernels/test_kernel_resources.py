"""The gate: every shipped tile, compiled ahead of time, has no spills and fits its chip."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from scalevit.kernels import bench, resources

# One process for each group, two compile jobs in all, so that the gate takes under two minutes on two cores.
GROUPS = (("sm_80", "gfx942", "gfx90a"), ("sm_89", "sm_90"), ("sm_100",))


def run_resources(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "scalevit.kernels.resources", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


@pytest.mark.parametrize("archs", GROUPS, ids="-".join)
def test_every_shipped_tile_passes(archs, tmp_path):
    jobs = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    done = run_resources("--jobs", jobs, "--json", str(tmp_path / "r.json"), "--arch", *archs)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "r.json").read_text())
    for arch in archs:
        pieces = {(r["piece"], r["save"]) for r in records if r["arch"] == arch}
        expected = {("fc1", s) for s in ("none", "slope", "pre")} | {("fc2_dgrad", s) for s in ("slope", "pre")}
        assert pieces >= expected | {("fc2", "none"), ("fc1_dgrad", "none"), ("fc1_wgrad", "none")}


def test_a_tile_that_spills_fails(tmp_path):
    """The whole 128x128 tile in one part, four warps: measured to spill in the backward of "lean"."""
    script = """
import sys
from scalevit.kernels import resources
from scalevit.kernels.tuning import Tile
job = resources.Job("sm_90", "test", "fc2_dgrad", "pre", Tile(128, 128, 64, parts=1))
resources.jobs_for = lambda *_: [job]
sys.exit(resources.main(["--jobs", "1"]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED: spills" in done.stdout


def test_the_benchmark_shows_the_table_without_a_device(monkeypatch, capsys):
    """What `scalevit bench kernels` does on a machine like this one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(resources, "main", lambda argv: print("the table", argv) or 0)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args([])) == 0
    printed = capsys.readouterr().out
    assert "No GPU here: nothing is measured" in printed
    assert "the table []" in printed
