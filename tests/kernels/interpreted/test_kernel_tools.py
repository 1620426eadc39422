"""The tuner and the benchmark on tiny problems: the numbers mean nothing here, the plumbing does."""

import csv
import json

import pytest
import torch
from scalevit.kernels import bench, resources, tuning
from scalevit.kernels.tuning import __main__ as tuner

CPU = torch.device("cpu")
TILE = tuning.Tile(32, 32, 32, parts=2)
TABLE = tuning.Table(
    "test", None, dict.fromkeys(tuning.SAVES, tuning.LIBRARY), dict.fromkeys(tuning.CANDIDATES, (TILE,)), ()
)


@pytest.mark.parametrize("save", tuning.SAVES)
def test_the_tuner_takes_the_fastest(save, monkeypatch):
    """Every piece is run with every choice; what the clock says decides."""
    ran = []

    def clock(calls, device):
        for call in calls:
            call()
        ran.append(len(calls))
        # Odd measurements (the candidates) are faster in the first half of the pieces, slower after.
        fast = len(ran) % 2 == 0 and len(ran) <= 4
        return bench.Timing(0, 1.0 if fast else 2.0 + len(ran) % 2 * -0.5, 0, 1)

    monkeypatch.setattr(tuner, "time_calls", clock)
    plan, times = tuner.tune_shape(TABLE, save, 40, 32, 64, CPU, torch.float32)
    assert plan.fc1 == TILE
    assert plan.fc2 == TILE
    assert plan.fc1_wgrad is None
    assert len(times) == (2 if save == "none" else 6)


def test_a_written_table_reads_back(tmp_path):
    plan = tuning.Plan(fc1=TILE)
    entry = {"sms": 132, "tokens": 64, "d": 32, "h": 64, "save": "fast", "plan": plan, "microseconds": {}}
    tuner.write_table(tmp_path / "sm_90.json", TABLE, [entry], {"device": "test"})
    table = tuning.read_table(tmp_path / "sm_90.json")
    assert table.measured == {"device": "test"}
    assert table.plan(132, 60, 32, 64, "fast") == plan
    assert table.candidates == TABLE.candidates


def test_the_tuner_needs_a_device(tmp_path, capsys):
    assert tuner.main(["--output", str(tmp_path)]) == 2
    assert "there is none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tuner.main(["--output", str(tmp_path), "--shape", "768"])


def test_the_benchmark_measures_and_writes(tmp_path):
    pytest.importorskip("matplotlib")
    mlps = bench.providers(CPU, ["eager", "fused_fast", "fused_lean", "fused_recompute"])
    ceilings = bench.measure_ceilings(CPU, torch.float32, size=64, copied=4096)
    results = list(bench.measure_case("tiny", 32, 64, 2, mlps, ceilings, CPU, torch.float32, tokens=5))
    assert {(r.what, r.provider) for r in results} == {(w, p) for w in bench.PASSES for p in mlps}
    assert all(0 < r.p20 <= r.p50 <= r.p80 for r in results)
    bench.print_results(results)
    bench.write_results(tmp_path, results, bench.environment(CPU, ceilings, "test"))
    bench.write_plots(tmp_path, results, bench.environment(CPU, ceilings, "test"))
    rows = list(csv.DictReader((tmp_path / "bench.csv").open()))
    assert len(rows) == len(results)
    assert rows[0]["torch"] == torch.__version__
    assert len(json.loads((tmp_path / "bench.json").read_text())["results"]) == len(results)
    assert (tmp_path / "speedup.png").stat().st_size > 1000
    assert (tmp_path / "roofline.png").stat().st_size > 1000


def test_interpreted_kernels_cannot_be_compiled(capsys):
    with pytest.raises(SystemExit):
        resources.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err
