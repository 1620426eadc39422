"""The tuner and the benchmark on tiny problems: the numbers mean nothing here, the plumbing does."""

import csv
import json
import sys
from dataclasses import replace

import pytest
import torch

from scalevit.kernels import bench, bench_plots, compile_report
from scalevit.kernels.tuning import tables, tuner

CPU = torch.device("cpu")
TILE = tables.Tile(32, 32, 32, parts=2)
TABLE = tables.Table(
    "test", None, dict.fromkeys(tables.SAVES, tables.LIBRARY), dict.fromkeys(tables.CANDIDATES, (TILE,)), ()
)


@pytest.mark.parametrize("save", tables.SAVES)
def test_the_tuner_takes_the_fastest(save, monkeypatch):
    """Every product is run with every choice; what the clock says decides."""
    ran = []

    def clock(calls, device):
        for call in calls:
            call()
        ran.append(len(calls))
        # Odd measurements (the candidates) are faster in the first half of the products, slower after.
        fast = len(ran) % 2 == 0 and len(ran) <= 4
        return bench.Timing(0, 1.0 if fast else 2.0 + len(ran) % 2 * -0.5, 0, 1)

    monkeypatch.setattr(tuner, "time_calls", clock)
    plan, times = tuner.tune_shape(TABLE, save, 40, 32, 64, CPU, torch.float32)
    assert plan.fc1 == TILE
    assert plan.fc2 == TILE
    assert plan.fc1_wgrad is None
    assert len(times) == (2 if save == "none" else 6)


@pytest.mark.parametrize("save", tables.SAVES)
def test_the_tuner_runs_every_product_of_a_gated_mlp(save, monkeypatch):
    """Each with the library and with each candidate, on buffers of the shapes that the operator has."""
    monkeypatch.setattr(tuner, "time_calls", lambda calls, device: [c() for c in calls] and bench.Timing(0, 1.0, 0, 1))
    table = replace(TABLE, name="test.gated")
    plan, times = tuner.tune_shape(table, save, 40, 32, 64, CPU, torch.float32)
    assert plan == tables.LIBRARY, "all take the same time, and the library comes first"
    assert list(times) == list(tables.PRODUCTS[: 2 if save == "none" else 6])
    assert all(len(measured) == 2 for measured in times.values())


def test_a_written_table_reads_back(tmp_path):
    plan = tables.KernelPlan(fc1=TILE)
    entry = {"sms": 132, "tokens": 64, "d": 32, "h": 64, "save": "fast", "plan": plan, "microseconds": {}}
    tuner.write_table(tmp_path / "sm_90.json", TABLE, [entry], {"device": "test"})
    table = tables.read_table(tmp_path / "sm_90.json")
    assert table.measured == {"device": "test"}
    assert table.plan(132, 60, 32, 64, "fast") == plan
    assert table.candidates == TABLE.candidates


def test_the_tuner_needs_a_device(tmp_path, capsys):
    assert tuner.main(["--output", str(tmp_path)]) == 2
    assert "there is none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tuner.main(["--output", str(tmp_path), "--shape", "768"])


def test_the_benchmark_measures_and_writes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    time_calls = bench.time_calls
    monkeypatch.setattr(bench, "time_calls", lambda *a, **_: time_calls(*a, seconds=0.0, at_least=2))
    mlps = bench.providers(CPU, ["eager", "fused_fast", "fused_lean", "fused_recompute"])
    ceilings = bench.measure_ceilings(CPU, torch.float32, size=64, copied=4096)
    case = ("tiny", 32, 64, 2, mlps, ceilings, CPU)
    results = list(bench.measure_case(*case, torch.float32, tokens=5))
    expected = {(w, p) for w in bench.PASSES for p in (*mlps, "eager_again")}
    assert {(r.what, r.provider) for r in results} == expected
    assert [r.what for r in results[: len(mlps)]] == ["full"] * len(mlps)
    autocast = list(bench.measure_case(*case, torch.bfloat16, tokens=5, passes=["full"], autocast=True))
    assert {(r.autocast, r.what) for r in autocast} == {(True, "full")}
    results += autocast
    assert all(0 < r.p20 <= r.p50 <= r.p80 for r in results)
    stacks = list(bench.measure_stack("tiny", 32, 64, 2, mlps, CPU, torch.float32, tokens=5, blocks=2))
    assert [s.provider for s in stacks] == list(mlps)
    bench.print_results(results)
    bench.print_stacks(stacks)
    about = bench.environment(CPU, "test") | {"gemm_ceiling_tflops": 1.0, "copy_ceiling_bytes_per_second": 1e9}
    bench.write_results(tmp_path, results, about, stacks)
    bench_plots.write_plots(tmp_path, results, about)
    rows = list(csv.DictReader((tmp_path / "bench.csv").open()))
    assert len(rows) == len(results)
    assert rows[0]["torch"] == torch.__version__
    written = json.loads((tmp_path / "bench.json").read_text())
    assert (len(written["results"]), len(written["stacks"])) == (len(results), len(stacks))
    assert written["drift"] == bench.drift(results) > 0
    assert (tmp_path / "speedup.png").stat().st_size > 1000
    assert (tmp_path / "roofline.png").stat().st_size > 1000


def test_the_benchmark_measures_gated_mlps(monkeypatch):
    """Under the name of a gated shape: packed weights, three products in the forward and six in the backward."""
    ran = []
    timing = bench.Timing(1.0, 2.0, 3.0, 1)
    monkeypatch.setattr(bench, "time_calls", lambda calls, *_, **__: ran.append([c() for c in calls]) or timing)
    mlps = bench.providers(CPU, ["eager", "fused_lean"], gated=True)
    ceilings = bench.Ceilings(1.0, 1e9)
    for autocast in (False, True):
        dtype = torch.bfloat16 if autocast else torch.float32
        results = list(
            bench.measure_case(
                "swiglu_b", 32, 48, 2, mlps, ceilings, CPU, dtype, tokens=5, passes=["full"], autocast=autocast
            )
        )
        assert [r.provider for r in results] == ["eager", "fused_lean", "eager_again"]
        assert {r.tflops for r in results} == {9 * 2 * 10 * 32 * 48 / 2.0 * 1e-6}
        gradients = [calls[0] for calls in ran[-3:]]
        assert {tuple(tuple(g.shape) for g in grads) for grads in gradients} == {
            ((10, 32), (96, 32), (96,), (32, 48), (32,))
        }
    assert set(bench.GATED_SHAPES) < set(bench.SHAPES)
    assert "cublaslt_tanh" not in bench.providers(torch.device("cuda"), gated=True)


def test_the_benchmark_autotunes_last(tmp_path, monkeypatch):
    """A run that is stopped in max-autotune's minutes has all the rest on disk, plots too."""
    order, plots = [], []

    def measure(shape, d, h, batch, mlps, ceilings, device, dtype, *, seconds, passes, autocast):
        order.append((shape, autocast, tuple(mlps)))
        if bench.SLOWEST in mlps:
            raise KeyboardInterrupt
        yield bench.BenchRow(shape, d, h, batch, autocast, "full", "eager", *(1.0,) * 6, 0, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(bench, "environment", lambda *_: {"device": "none", "torch": "", "triton": ""})
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: bench.Ceilings(1.0, 1.0))
    monkeypatch.setattr(bench, "measure_stack", lambda *_: iter(()))
    monkeypatch.setattr(bench, "measure_case", measure)
    monkeypatch.setattr(bench, "can_plot", lambda: True)
    monkeypatch.setattr(bench, "write_plots", lambda folder, results, about: plots.append(len(results)))
    command = ["--shapes", "vit_b", "vit_b_half", "vit_s", "--batches", "8", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        bench.main(command)
    quick = tuple(n for n in bench.PROVIDERS if n != bench.SLOWEST)
    engines = tuple(n for n in quick if n != "cublaslt_tanh")
    assert order == [
        ("vit_b", False, quick), ("vit_b_half", False, quick), ("vit_s", False, quick),
        ("vit_b", True, engines), ("vit_b_half", True, engines), ("vit_b", False, (bench.SLOWEST,)),
    ]  # fmt: skip
    assert plots == [1, 2, 3, 4, 5]
    assert len(json.loads((tmp_path / "bench.json").read_text())["results"]) == 5


def test_the_benchmark_runs_without_matplotlib(tmp_path, monkeypatch, capsys):
    """It names the extra in one line, before it measures, and writes everything but the figures."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    row = bench.BenchRow("vit_s", 1, 1, 8, False, "full", "eager", *(1.0,) * 6, 0, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(bench, "environment", lambda *_: {"device": "none", "torch": "", "triton": ""})
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: bench.Ceilings(1.0, 1.0))
    monkeypatch.setattr(bench, "measure_case", lambda *_, **__: iter([row]))
    command = ["--shapes", "vit_s", "--batches", "8", "16", "--providers", "eager", "--output", str(tmp_path)]
    assert bench.main(command) == 0
    assert capsys.readouterr().out.count("matplotlib is not installed (pip install matplotlib)") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"bench.csv", "bench.json"}


def test_the_benchmark_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--providers", "nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_the_tuner_keeps_what_it_does_not_measure(tmp_path, monkeypatch):
    """Entries of other shapes stay, and the candidates are the shipped ones wherever SCALEVIT_TUNING points."""
    shipped = tables.read_table(tables.TABLES / "sm_90.json")
    keys = [{"sms": 2, "tokens": 64, "d": d, "h": 64, "save": s} for d in (32, 48) for s in tables.SAVES]
    before = [{**k, "plan": tables.LIBRARY, "microseconds": {}} for k in keys]
    tuner.write_table(tmp_path / "sm_90.json", TABLE, before, {"device": "test"})
    monkeypatch.setenv("SCALEVIT_TUNING", str(tmp_path))
    seen = []

    def tune(table, save, m, d, h, device):
        seen.append(table.candidates)
        return tables.KernelPlan(fc1=TILE), {"fc1": {"library": 1.0}}

    class Properties:
        multi_processor_count = 2

    monkeypatch.setattr(tuner, "tune_shape", tune)
    monkeypatch.setattr(tuner, "device_name", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "test")
    assert tuner.main(["--output", str(tmp_path), "--tokens", "50", "--shape", "32x64"]) == 0
    table = tables.read_table(tmp_path / "sm_90.json")
    assert seen == [shipped.candidates] * 3
    assert table.candidates == shipped.candidates
    assert len(table.entries) == 6
    assert table.plan(2, 50, 48, 64, "fast") == tables.LIBRARY
    assert table.plan(2, 50, 32, 64, "fast") == tables.KernelPlan(fc1=TILE)
    # Gated MLPs have their own file, with their own candidates.
    assert tuner.main(["--output", str(tmp_path), "--tokens", "50", "--shape", "32x64", "--gated"]) == 0
    gated = tables.read_table(tmp_path / "sm_90.gated.json")
    assert seen[3:] == [tables.read_table(tables.TABLES / "sm_90.gated.json").candidates] * 3
    assert gated.plan(2, 50, 32, 64, "fast") == tables.KernelPlan(fc1=TILE)
    assert tables.read_table(tmp_path / "sm_90.json").entries == table.entries


def test_interpreted_kernels_cannot_be_compiled(capsys):
    with pytest.raises(SystemExit):
        compile_report.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err
