"""`scalevit bench train` with a small model."""

import csv
import json
from pathlib import Path

import pytest

from launching import QUICKSTART, Ranks
from scalevit.models.reductions import REDUCTIONS

WORKER = Path(__file__).with_name("training_bench_worker.py")


@pytest.mark.parametrize("ranks", [1, 2])
def test_rates_are_those_of_all_ranks_and_of_each(tmp_path: Path, ranks: int) -> None:
    arguments = [
        "bench",
        "train",
        "--config",
        QUICKSTART,
        "--mlps",
        "eager",
        "--steps",
        "2",
        "--output",
        str(tmp_path / "results"),
    ]
    fsdp = ["engine.name=fsdp", "train.micro_batch=4", "train.global_batch=8"]
    Ranks(ranks, str(WORKER), *arguments, *fsdp, log=tmp_path / "log").wait()
    rows = json.loads((tmp_path / "results" / "bench_train.json").read_text())["rows"]
    assert [row["strategy"] for row in rows] == [part.kind() for part in REDUCTIONS]
    for row in rows:
        assert (row["ranks"], row["engine"]) == (ranks, "FSDP2")
        assert row["images_per_second_per_rank"] == pytest.approx(4e3 / row["milliseconds_p50"])
        assert row["images_per_second"] == pytest.approx(ranks * row["images_per_second_per_rank"])
        assert row["ratio"] == pytest.approx(row["images_per_second"] / rows[0]["images_per_second"])
    with (tmp_path / "results" / "bench_train.csv").open(newline="") as file:
        assert [line["strategy"] for line in csv.DictReader(file)] == [row["strategy"] for row in rows]
