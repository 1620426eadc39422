"""The gate: every shipped tile, compiled ahead of time, has no spills and fits its chip."""

import json
import os
import subprocess
import sys

import pytest

# One process for each group, two compile jobs in all, so that the gate takes under two minutes on two cores.
GROUPS = (("sm_80", "gfx942", "gfx90a"), ("sm_89", "sm_90"), ("sm_100",))


def resources(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", "scalevit.kernels.resources", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


@pytest.mark.parametrize("archs", GROUPS, ids="-".join)
def test_every_shipped_tile_passes(archs, tmp_path):
    jobs = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    done = resources("--jobs", jobs, "--json", str(tmp_path / "r.json"), "--arch", *archs)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "r.json").read_text())
    for arch in archs:
        pieces = {(r["piece"], r["save"]) for r in records if r["arch"] == arch}
        expected = {("fc1", s) for s in ("none", "slope", "pre")} | {
            ("fc2_dgrad", s) for s in ("slope", "pre")
        }
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


def test_the_interpreter_is_refused():
    done = resources(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_the_benchmark_shows_the_table_without_a_device():
    """What `scalevit bench kernels` does on a machine like this one."""
    script = """
import argparse, sys
from scalevit.kernels import bench, resources
jobs_for = resources.jobs_for
resources.jobs_for = lambda *a: jobs_for(*a)[:1]
parser = argparse.ArgumentParser()
bench.add_arguments(parser)
sys.exit(bench.run(parser.parse_args([])))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No GPU here" in done.stdout
    assert "all pass" in done.stdout
