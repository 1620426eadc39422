"""Every shipped tile, compiled ahead of time, has no spills and fits its device."""

import argparse
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scalevit.kernels import bench, compile_report
from scalevit.kernels.compile_jobs import LEAST_AND_MOST, OF_GATES, CompileJob
from scalevit.kernels.tuning import tables


def run_report(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "scalevit.kernels.compile_report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=5400)


def check_gate(archs: tuple[str, ...], folder: Path, *arguments: str) -> list[dict]:
    """The records of a report, all kernels of which must pass."""
    jobs = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    done = run_report("--jobs", jobs, "--json", str(folder / "r.json"), "--arch", *archs, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "r.json").read_text())


@pytest.fixture(scope="module")
def shipped(request, tmp_path_factory):
    """Records of the wanted architectures' tiles for plain MLPs, from one run: a few minutes on one core."""
    name = test_every_shipped_tile_passes.__name__
    items = [item for item in request.session.items if getattr(item, "originalname", None) == name]
    archs = {item.callspec.params["arch"]: None for item in items}
    return check_gate(tuple(archs), tmp_path_factory.mktemp("report"), "--mlp", "plain")


@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
def test_every_shipped_tile_passes(arch, shipped):
    """Each tile with the least and with the most work, so that every dtype, activation, bias and layout occurs."""
    products = {("fc1", s) for s in ("none", "slope", "pre")} | {("fc2_dgrad", s) for s in ("slope", "pre")}
    products |= {("fc2", "none"), ("fc1_dgrad", "none"), ("fc1_wgrad", "none"), ("reduce", "none")}
    products |= {("gelu", "none"), ("gelu", "slope"), ("dgelu", "slope"), ("dgelu", "pre")}
    mine = [r for r in shipped if r["arch"] == arch]
    assert {(r["product"], r["save"]) for r in mine} >= products
    for product in ("fc1", "fc2_dgrad"):
        seen = [r for r in mine if r["product"] == product and r["save"] == "pre"]
        assert {(r["dtype"], r["activation"], r["bias"]) for r in seen} == {
            ("bf16", "gelu", False), ("fp16", "gelu_tanh", True),
        }  # fmt: skip
    assert {r["layout"] for r in mine} == {"aligned", "even", "any"}
    assert {r["dtype"] for r in mine if r["product"] == "gelu"} == {"bf16", "fp32"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
def test_every_shipped_tile_passes_however_it_is_called(arch, tmp_path):
    records = check_gate((arch,), tmp_path, "--every")
    for product, save in (("fc1", "none"), ("fc1", "slope"), ("fc1", "pre"), ("fc2_dgrad", "pre")):
        seen = {
            (r["dtype"], r["activation"], r["bias"]) for r in records if (r["product"], r["save"]) == (product, save)
        }
        assert seen == set(itertools.product(("bf16", "fp16"), ("gelu", "gelu_tanh"), (True, False)))
    for product, save in (
        ("gated_fc1", "none"),
        ("gated_fc1", "slope"),
        ("gated_fc1", "pre"),
        ("gated_fc2_dgrad", "pre"),
    ):
        seen = {
            (r["dtype"], r["activation"], r["bias"]) for r in records if (r["product"], r["save"]) == (product, save)
        }
        assert seen == set(itertools.product(("bf16", "fp16"), ("silu", "gelu", "gelu_tanh"), (True, False)))
    assert {r["product"] for r in records} >= {"gated_fc1_dgrad", "gate", "dgate"}


def heaviest_jobs(arch: str, name: str) -> list[CompileJob]:
    """Each tile of the plans for training gated MLPs once, in the call with the most work."""
    table = tables.read_table(tables.TABLES / f"{name}{tables.GATED}.json")
    # fc1 does the most where it saves the factors, fc2's dgrad where it computes them; later ones replace earlier ones.
    order = {"fc1": ("lean", "fast"), "fc2_dgrad": ("fast", "lean")}
    tiles = {(p, table.default[save].tiles()[p]): save for p, saves in order.items() for save in saves}
    return [
        CompileJob(arch, name, OF_GATES[product], tables.KEPT[save], replace(tile, ctas_per_sm=0)).called(
            *LEAST_AND_MOST[-1]
        )
        for (product, tile), save in tiles.items()
    ]


@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
def test_every_shipped_tile_of_gated_plans_passes(arch):
    """The slow test, and the command without arguments, compile the other tiles and calls."""
    jobs = heaviest_jobs(arch, arch)
    assert {(job.product, job.save) for job in jobs} >= {("gated_fc1", "slope"), ("gated_fc2_dgrad", "pre")}
    if arch == "sm_90":
        jobs += heaviest_jobs(arch, "fallback")
    assert set(jobs) <= set(compile_report.jobs_for([arch], mlps=["gated"]))
    for job, report in compile_report.compile_all(jobs, 1):
        assert not isinstance(report, str), f"{job}: {report}"
        assert report.faults() == [], job


def test_the_fall_back_is_what_unaligned_tensors_run():
    """The report compiles layout "any" only for the fall-back's tiles."""
    table = tables.read_table(tables.TABLES / "fallback.json")
    gated = tables.read_table(tables.TABLES / "fallback.gated.json")
    for plan in (*table.default.values(), *gated.default.values()):
        assert set(plan.tiles().values()) == {tables.UNALIGNED}
    for kind, tiles in (*table.candidates.items(), *gated.candidates.items()):
        expected = tables.UNALIGNED_WGRAD if kind == "wgrad" else tables.UNALIGNED
        assert {replace(t, splits=1) for t in tiles} == {expected}


def test_a_tile_that_spills_fails(tmp_path):
    """A 128x128 tile in one part with four warps spills in the backward of "lean"."""
    script = """
import sys
from scalevit.kernels import compile_report
from scalevit.kernels.compile_jobs import CompileJob
from scalevit.kernels.tuning.tables import Tile
job = CompileJob("sm_90", "test", "fc2_dgrad", "pre", Tile(128, 128, 64, parts=1), bias=True)
compile_report.jobs_for = lambda *_, **__: [job]
sys.exit(compile_report.main(["--jobs", "1"]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED: spills" in done.stdout


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as refusal:
        compile_report.main(list(arguments))
    assert refusal.value.code == 2
    return capsys.readouterr().err


def test_a_missing_or_malformed_table_is_named(tmp_path, capsys):
    arguments = ("--tables", str(tmp_path), "--arch", "sm_90")
    assert f"--tables: {tmp_path} has no table for sm_90" in refused(capsys, *arguments)
    (tmp_path / "sm_90.json").write_text("{")
    assert "sm_90.json: not JSON" in refused(capsys, *arguments)


def test_a_tuned_table_passes_the_same_gate(tmp_path):
    """--tables compiles a folder's own tables."""
    plan = dict.fromkeys(tables.PRODUCTS, "library")
    spills = {"block_m": 128, "block_n": 128, "block_k": 64}
    entry = {"sms": 132, "tokens": 64, "d": 64, "h": 64, "save": "lean", "plan": plan | {"fc2_dgrad": spills}}
    table = {"measured": {}, "default": dict.fromkeys(tables.SAVES, plan), "candidates": {}, "entries": [entry]}
    (tmp_path / "sm_90.json").write_text(json.dumps(table))
    done = run_report("--tables", str(tmp_path), "--arch", "sm_90", "--jobs", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "compiling with 1 processes, which takes minutes" in done.stdout.splitlines()[0]
    assert any("fc2_dgrad" in line and "FAILED: spills" in line for line in done.stdout.splitlines())


def test_the_benchmark_shows_the_table_without_a_device(monkeypatch, capsys):
    """What `scalevit bench kernels` does on a machine like this one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compile_report, "main", lambda argv: print("the table", argv) or 0)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args([])) == 0
    printed = capsys.readouterr().out
    assert "No GPU on this machine, so nothing is measured" in printed
    assert "the table []" in printed
