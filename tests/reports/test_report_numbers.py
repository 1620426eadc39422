"""The report's numbers, recomputed from metrics.jsonl by code that shares nothing with the report's."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from run_folders import PARAMETERS, records, write_run
from scalevit.cli.main import main

SEEDS = range(4)
OFFSETS = {"none": 0.0, "grouped": -0.7, "shallow": 0.4}
COLUMNS = {
    "best_top1_percent": "best top-1",
    "last_top1_percent": "last top-1",
    "peak_to_final_gap_points": "peak-to-final gap",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 groups of 4 seeds below a folder, one run of them unfinished, and the report."""
    folder = tmp_path_factory.mktemp("numbers")
    for group, offset in OFFSETS.items():
        for seed in SEEDS:
            unfinished = (group, seed) == ("shallow", 3)
            lines = records(10 * seed + len(group), offset + seed / 2, epochs=5 if unfinished else 8)
            write_run(folder / "runs" / group / f"{group}-{seed}", group, seed, lines=lines, finished=not unfinished)
    main(["report", str(folder / "runs"), "--output", str(folder / "report")])
    return folder


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "report" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def measured(folder: Path, group: str, prefix: str) -> dict[int, dict[str, float]]:
    """By seed of the finished runs of a group."""
    found = {}
    for seed in SEEDS:
        run = folder / "runs" / group / f"{group}-{seed}"
        if (run / "summary.json").exists():
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            evaluations = [line for line in lines if line["kind"] == "evaluation"]
            top1, top5 = (np.array([line[prefix + key] for line in evaluations]) for key in ("top1", "top5"))
            best = int(np.argmax(top1))
            found[seed] = {
                "best_top1_percent": top1[best],
                "best_top5_percent": top5[best],
                "last_top1_percent": top1[-1],
                "last_top5_percent": top5[-1],
                "peak_to_final_gap_points": top1.max() - top1[-1],
                "best_epoch": best + 1,
                "images_per_second": json.loads((run / "summary.json").read_text())["images_per_second"],
            }
    return found


def test_accuracy(folder: Path) -> None:
    rows = table(folder, "accuracy")
    assert [(row["group"], row["weight_set"]) for row in rows] == [
        (group, shown) for group in ("none", "grouped", "shallow") for shown in ("EMA", "weights")
    ]
    for row in rows:
        runs = list(measured(folder, row["group"], "ema_" if row["weight_set"] == "EMA" else "").values())
        assert int(row["seeds"]) == len(runs) == (3 if row["group"] == "shallow" else 4)
        for key in runs[0]:
            values = [run[key] for run in runs]
            mean_and_std = (float(row[key]), float(row[f"{key}_std"]))
            assert mean_and_std == pytest.approx((np.mean(values), np.std(values, ddof=1)), rel=1e-9, abs=1e-12), key


def test_comparisons(folder: Path) -> None:
    rows = table(folder, "comparisons")
    assert len(rows) == 2 * 2 * 3
    for weight_set, prefix in (("EMA", "ema_"), ("weights", "")):
        for key, shown in COLUMNS.items():
            family = [row for row in rows if (row["weight_set"], row["measure"]) == (weight_set, shown)]
            baseline, expected = measured(folder, "none", prefix), []
            for row in family:
                own = measured(folder, row["group"], prefix)
                pairs = [(own[seed][key], baseline[seed][key]) for seed in own]
                result = stats.ttest_rel(*zip(*pairs, strict=True))
                interval = result.confidence_interval(0.95)
                mean = np.mean([a - b for a, b in pairs])
                expected.append(result.pvalue)
                assert int(row["pairs"]) == len(pairs)
                found = [
                    float(row[name]) for name in ("difference_points", "low_points", "high_points", "t", "p", "df")
                ]
                assert found == pytest.approx(
                    [mean, interval.low, interval.high, result.statistic, result.pvalue, len(pairs) - 1], rel=1e-7
                )
            smaller, larger = sorted(expected)
            corrected = {smaller: min(1, 2 * smaller), larger: max(min(1, 2 * smaller), larger)}
            assert [float(row["p_holm"]) for row in family] == pytest.approx([corrected[p] for p in expected], rel=1e-7)


def test_models_and_runs(folder: Path) -> None:
    models = table(folder, "models")
    assert {row["group"]: int(row["parameters"]) for row in models} == {name: PARAMETERS[name] for name in OFFSETS}
    assert {(row["unique_mlps"], row["gmacs"]) for row in models} == {("6", "0.0118")}
    runs = {row["run"]: row for row in table(folder, "runs")}
    assert len(runs) == 12
    stopped = runs["shallow-3"]
    assert (stopped["state"], stopped["step"], stopped["epoch"]) == ("interrupted", "50", "5")
    assert "no summary.json (last record at step 50)" in stopped["remarks"]
    assert stopped["images_per_second"] == ""
    path = folder / "report" / runs["grouped-2"]["config"]
    assert json.loads(path.read_text())["name"] == "grouped-2"


def test_the_same_report_is_written_again(folder: Path, tmp_path: Path) -> None:
    """From the same runs, all but the date; files of others in the folder stay."""
    shutil.copytree(folder / "report", tmp_path / "report")
    (tmp_path / "report" / "notes.txt").write_text("mine")
    before = {path.name: path.read_text() for path in (tmp_path / "report").glob("*.csv")}
    (tmp_path / "report" / "accuracy.csv").write_text("")
    main(["report", str(folder / "runs"), "--output", str(tmp_path / "report")])
    after = {path.name: path.read_text() for path in (tmp_path / "report").glob("*.csv")}
    assert {name: text for name, text in after.items() if name != "runs.csv"} == {
        name: text for name, text in before.items() if name != "runs.csv"
    }  # the links in runs.csv are relative to the report
    assert (tmp_path / "report" / "notes.txt").read_text() == "mine"
