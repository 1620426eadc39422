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


def check_gate(arch: str, folder: Path, *arguments: str) -> list[dict]:
    """The records of a report, all kernels of which must pass."""
    done = run_report("--json", str(folder / "r.json"), "--arch", arch, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "r.json").read_text())


def compiled(jobs: list[CompileJob]) -> None:
    for job, report in compile_report.compile_all(jobs, 1):
        assert not isinstance(report, str), f"{job}: {report}"
        assert report.faults() == [], job


@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
def test_every_shipped_tile_passes(arch):
    """Each tile with the most work; for sm_90 with the least too, so that every dtype and layout occurs.

    The slow test, and the command without arguments, compile the other calls.
    """
    jobs = compile_report.jobs_for([arch], mlps=["plain"])
    most = [job.called(*LEAST_AND_MOST[-1]) for job in jobs]
    jobs = jobs if arch == "sm_90" else list(dict.fromkeys(most))
    products = {("fc1", s) for s in ("none", "slope", "pre")} | {("fc2_dgrad", s) for s in ("slope", "pre")}
    products |= {("fc2", "none"), ("fc1_dgrad", "none"), ("fc1_wgrad", "none"), ("reduce", "none")}
    products |= {("gelu", "none"), ("gelu", "slope"), ("dgelu", "slope"), ("dgelu", "pre")}
    assert {(job.product, job.save) for job in jobs} >= products
    least = {("bf16", "gelu", False)} if arch == "sm_90" else set()
    for product in ("fc1", "fc2_dgrad"):
        seen = {(job.dtype, job.activation, job.bias) for job in jobs if (job.product, job.save) == (product, "pre")}
        assert seen == {("fp16", "gelu_tanh", True), *least}
    assert {job.layout for job in jobs} == {"aligned", "even", "any"}
    assert {job.dtype for job in jobs if job.product == "gelu"} == {"fp32", *(dtype for dtype, *_ in least)}
    compiled(jobs)


@pytest.mark.slow
@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
def test_every_shipped_tile_passes_however_it_is_called(arch, tmp_path):
    records = check_gate(arch, tmp_path, "--every")
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
    compiled(jobs)


def test_the_fall_back_is_what_unaligned_tensors_run():
    """The report compiles layout "any" only for the fall-back's tiles."""
    table = tables.read_table(tables.TABLES / "fallback.json")
    gated = tables.read_table(tables.TABLES / "fallback.gated.json")
    for plan in (*table.default.values(), *gated.default.values()):
        assert set(plan.tiles().values()) == {tables.UNALIGNED}
    for kind, tiles in (*table.candidates.items(), *gated.candidates.items()):
        expected = tables.UNALIGNED_WGRAD if kind == "wgrad" else tables.UNALIGNED
        assert {replace(t, splits=1) for t in tiles} == {expected}


def test_a_tile_that_spills_fails(monkeypatch, capsys):
    """A 128x128 tile in one part with four warps spills in the backward of "lean"."""
    job = CompileJob("sm_90", "test", "fc2_dgrad", "pre", tables.Tile(128, 128, 64, parts=1), bias=True)
    monkeypatch.setattr(compile_report, "jobs_for", lambda *_, **__: [job])
    assert compile_report.main(["--jobs", "1"]) == 1
    assert "FAILED: spills" in capsys.readouterr().out


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
