"""`scalevit plan` as a user calls it."""

import json
from pathlib import Path
from typing import Any

import pytest

from commands import refused
from launching import QUICKSTART
from scalevit.cli.main import main
from scalevit.cli.plan_tables import suggestion
from scalevit.config.loading import load_config
from scalevit.engines import ENGINES
from scalevit.models.reductions import REDUCTIONS
from scalevit.planning.devices import load_device
from scalevit.planning.estimate import estimate_run


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["plan", "--config", QUICKSTART, *arguments])
    return capsys.readouterr().out


def test_reports_what_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    estimate = json.loads(plan(capsys, "--gpus", "2", "--device", "h200", "--json"))
    assert [row["strategy"] for row in estimate["rows"]] == [
        part.kind() for part in REDUCTIONS for engine in ENGINES for _ in engine().variants()
    ]
    assert all(row["fits"] and row["largest_micro_batch"] == 32 for row in estimate["rows"])
    # A device with one byte too little for this micro-batch, which is enough for half of it.
    row = next(r for r in estimate["rows"] if (r["strategy"], r["engine"]) == ("grouped", "FSDP2"))
    device = {**estimate["device"], "name": "tight", "memory_bytes": row["memory_bytes"] - 1, "usable_memory": 1.0}
    (tmp_path / "tight.json").write_text(json.dumps(device))
    # Two numbers of devices: the own row only, which takes less time.
    arguments = ["--gpus", "2,1", "--device", str(tmp_path / "tight.json"), "--json", "engine.name=fsdp"]
    row = json.loads(plan(capsys, *arguments))[0]["rows"][0]
    assert not row["fits"]
    assert row["largest_micro_batch"] == 16
    assert row["bound_by"] in ("compute", "memory", "link")


def test_the_configs_own_engine_keeps_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    def row(*settings: str, nodes: int = 1) -> dict[str, Any]:
        # Two numbers of devices: the own row only, which takes less time.
        shown = plan(capsys, "--gpus", "4,8", "--nodes", str(nodes), "--json", "train.global_batch=128", *settings)
        return json.loads(shown)[0]["rows"][0]

    plain, overlapping = row(), row("engine.overlap_comm=true")
    bucket = 4 * int(5e8)  # a second bucket is filled while the first is reduced
    buffers = [each["cost"]["memory"]["backward_buffers"] for each in (plain, overlapping)]
    assert buffers[1] - buffers[0] == bucket
    # Shards within a node are gathered over its links, and only gradients cross the network.
    sharded = row("engine.name=fsdp", "engine.shard_size=2", nodes=2)
    assert sharded["seconds"]["link"] < row("engine.name=fsdp", nodes=2)["seconds"]["link"] / 2


def test_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, "--gpus", "2", "--nodes", "2", "--device", "cpu", "engine.name=fsdp", "engine.shard_size=1")
    for part in ("ZeRO 3", "HSDP, 1 shards", "largest", "bound by", "recompute", "fewer parameters", "Source:"):
        assert part in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("settings", "memory", "suggested"),
    [
        (["train.micro_batch=auto"], 8e9, 'train.micro_batch="auto" starts at 22 (1 x 22 images per rank and step'),
        (["train.micro_batch=8"], 8e9, "train.micro_batch=8 fits, and so does 22"),
        (["train.micro_batch=32"], 8e9, "train.micro_batch=32 fits; a rank has 22 images per step"),
        (["train.micro_batch=32"], 2.022e9, "train.micro_batch=32 does not fit; try train.micro_batch="),
        (["train.micro_batch=8"], 2.1e8, "not even one image fits"),
    ],
)
def test_suggests_a_micro_batch_for_any_world(settings: list[str], memory: float, suggested: str) -> None:
    device = load_device("cpu").model_copy(update={"memory_bytes": memory, "usable_memory": 1.0})
    arguments: dict[str, Any] = {"gpus": 3, "nodes": 1, "optimizer_tensors": 2, "optimizer_refusals": {}}
    estimate = estimate_run(load_config(QUICKSTART, settings), device, **arguments, compare=False)
    assert suggestion(estimate).startswith(f"grouped with ZeRO 1 on 3 ranks: {suggested}")


def test_engines_that_cannot_run_the_optimizer_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(plan(capsys, "--gpus", "2", "engine.stage=0", "optimizer.name=muon").split())
    assert "grouped ZeRO 0" in shown
    assert "grouped ZeRO 1" not in shown
    assert shown.count("left out: ZeRO 1, ZeRO 2, ZeRO 3, FSDP2 (optimizer.name = muon: its update needs whole") == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gpus", "0"], ["argument --gpus: 0: must be at least 1"]),
        (["--gpus", "-4"], ["argument --gpus: -4: must be at least 1"]),
        (["--gpus", "2", "--nodes", "0"], ["argument --nodes: 0: must be at least 1"]),
        (["--gpus", "3", "--nodes", "2"], ["--gpus 3", "nodes = 2"]),
        (["--gpus", "65"], ["train.global_batch = 64", "at least the 65 ranks"]),
        (["--gpus", "2", "--device", "h20"], ["h20", "nearest: h200"]),
        (["--gpus", "2", "--device", "l4"], ["--device l4", "only its peak", "FILE.json"]),
        (["--gpus", "2", "--device", "missing.json"], ["missing.json", "cannot be read"]),
        (["--gpus", "2", "train.epoch=3"], ["train.epoch", "nearest: train.epochs"]),
        (["--gpus", "2", "reduction.group_size=4"], ["group_size"]),
        (["--gpus", "4", "engine.name=fsdp", "engine.shard_size=3"], ["engine.shard_size = 3"]),
        (["--gpus", "2", "optimizer.name=muon"], ['optimizer.name = "muon"', "whole matrices", "ZeRO stage 0"]),
        (["--gpus", "2", "engine.name=fsdp", "optimizer.name=muon"], ["optimizer.name", "FSDP2 with one shard"]),
        (["--gpus", "2", "engine.native.zero_optimization.reduce_bucket_size=x"], ["reduce_bucket_size"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_user_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]) -> None:
    line = refused(capsys, "plan", "--config", QUICKSTART, *arguments)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not valid JSON"),
        ('{"name": "x", "flops": 1}', "unknown key flops"),
        ('{"name": "x"}', "flops_16bit: Field required"),
    ],
)
def test_an_invalid_device_file_is_reported_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, part: str
) -> None:
    (tmp_path / "device.json").write_text(content)
    device = tmp_path / "device.json"
    assert part in refused(capsys, "plan", "--config", QUICKSTART, "--gpus", "2", "--device", device)
