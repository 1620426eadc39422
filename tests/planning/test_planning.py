"""`scalevit plan` against what real ranks hold, keep and send."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import accounting
from launching import QUICKSTART, SECONDS, environment
from scalevit.cli.main import main
from scalevit.config.model import ModelConfig
from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.fsdp.settings import FsdpSettings
from scalevit.models.build import build_model
from scalevit.models.costs import model_costs
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.planning.activations import saved_bytes, trace
from scalevit.planning.engines import Layout, account

SMALL = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=16,
    num_classes=5,
    drop_path=0.1,
    kwargs={"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2},
)
BATCH = 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return accounting.measure(tmp_path_factory.mktemp("accounting"))


def name(row: dict[str, Any]) -> str:
    return f"{row['ranks']} x {row['engine']}, {row['reduction']}, accumulation {row['accumulation']}"


def test_a_rank_holds_what_was_estimated(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        measured, estimated = row["measured"]["held"], row["estimated"]["held"]
        # Of all tensors: flat partitions are padded, AdamW counts steps, and ZeRO keeps a whole gradient where its
        # partition has a part of it, which weighs in a model of 16 layers.
        tolerance = {"gradients": 0.01, "all": 0.005}
        for purpose, size in estimated.items():
            assert measured[purpose] == pytest.approx(size, rel=tolerance.get(purpose, 0.001)), (name(row), purpose)


def test_a_step_never_needs_more_than_was_estimated(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        measured, estimated = row["measured"]["step_peak"], row["estimated"]["step_peak"]
        assert measured <= estimated, name(row)
        # From above: all parts are added up at their largest, but gradients grow as activations shrink.
        assert estimated <= 1.4 * measured, name(row)


def test_a_rank_sends_what_was_estimated(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        measured, estimated = row["measured"]["sent"], row["estimated"]["sent"]
        for kind in ("all_reduce", "reduce_scatter", "all_gather"):
            if row["ranks"] == 1 and measured.get(kind, 0) == 0:
                continue  # not called where there is nobody to talk to
            # Norms and overflow flags are a few numbers; partitions are padded.
            assert measured.get(kind, 0) == pytest.approx(estimated[kind], rel=0.001, abs=200), (name(row), kind)
        assert set(measured) <= {"all_reduce", "reduce_scatter", "all_gather"}, name(row)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp"])
def test_grouped_sends_less_by_its_share_of_parameters(rows: list[dict[str, Any]], engine: str) -> None:
    none, grouped = (
        next(r for r in rows if (r["ranks"], r["engine"], r["reduction"], r["accumulation"]) == (2, engine, kind, 1))
        for kind in ("none", "grouped")
    )
    share = grouped["parameters"] / none["parameters"]

    def ratio(kind: str) -> float:
        return grouped["measured"]["sent"][kind] / none["measured"]["sent"][kind]

    assert ratio("reduce_scatter" if engine in ("zero3", "fsdp") else "all_reduce") == pytest.approx(share, rel=0.01)
    if engine == "fsdp":
        # Shared MLPs stay gathered from the forward to the backward, so even less is gathered.
        assert ratio("all_gather") < share
    else:
        assert ratio("all_gather") == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("reduction", [NoReduction(), GroupedReduction()], ids=lambda r: r.strategy)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_of_the_real_model(reduction, checkpointing: bool, precision: str) -> None:
    model = build_model(SMALL, reduction, seed=0).train()
    if checkpointing:
        for block in transformer_blocks(model):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with saved_bytes(model) as saved:
        with autocast:
            logits = model(torch.randn(BATCH, 3, 16, 16))
        torch.nn.functional.cross_entropy(logits.float(), torch.rand(BATCH, 5))
    estimate = trace(
        SMALL, reduction, mode="eager", precision=precision, activation_checkpointing=checkpointing, batch=BATCH
    )
    assert estimate.saved_bytes == saved.bytes


def test_activations_of_the_fused_mlp_are_those_of_the_kernels() -> None:
    """Triton's interpreter runs them, in a process of its own."""
    script = """
import json, torch
from scalevit.config.model import KernelsConfig
from scalevit.models.build import build_model
from scalevit.models.fused_mlp import fuse_mlps
from scalevit.planning.activations import saved_bytes
from test_planning import SMALL, GroupedReduction
result = {}
for mode in ("fast", "lean", "recompute"):
    model = build_model(SMALL, GroupedReduction(), seed=0).train()
    fuse_mlps(model, KernelsConfig(mlp="triton", save=mode), torch.device("cpu"))
    with saved_bytes(model) as saved:
        torch.nn.functional.cross_entropy(model(torch.randn(1, 3, 16, 16)), torch.rand(1, 5))
    result[mode] = saved.bytes
print(json.dumps(result))
"""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    paths = f"import sys; sys.path[:0] = {folders!r}\n"
    outcome = subprocess.run(
        [sys.executable, "-c", paths + script],
        env=environment(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert outcome.returncode == 0, outcome.stderr
    for mode, size in json.loads(outcome.stdout.splitlines()[-1]).items():
        settings: Any = {"mode": mode, "precision": "fp32", "activation_checkpointing": False, "batch": 1}
        assert trace(SMALL, GroupedReduction(), **settings).saved_bytes == size, mode


def test_save_modes_differ_by_bytes_per_hidden_unit_and_token() -> None:
    settings: Any = {"precision": "bf16", "activation_checkpointing": False, "batch": BATCH}
    saved = {
        mode: trace(SMALL, NoReduction(), mode=mode, **settings).saved_bytes for mode in ("fast", "lean", "recompute")
    }
    hidden = BATCH * 4 * 17 * 128  # micro-batch, blocks, tokens, units
    assert saved["fast"] - saved["lean"] == 2 * hidden
    assert saved["lean"] - saved["recompute"] == 2 * hidden


def test_flops_are_those_of_describe() -> None:
    settings: Any = {"mode": "fast", "precision": "bf16", "batch": BATCH}
    plain = trace(ModelConfig(), NoReduction(), activation_checkpointing=False, **settings).flops / BATCH
    again = trace(ModelConfig(), NoReduction(), activation_checkpointing=True, **settings).flops / BATCH
    known = model_costs(ModelConfig(), NoReduction()).training_flops
    # Attention's backward computes QK^T a second time, which the usual three passes leave out.
    assert plain == pytest.approx(known, rel=0.01)
    assert again / plain == pytest.approx(4 / 3, rel=0.01)


@pytest.mark.parametrize("engine", [*(DeepSpeedSettings(stage=stage) for stage in range(4)), FsdpSettings()], ids=str)
def test_grouped_vit_base_sends_a_third_less(engine) -> None:
    layouts = [
        Layout.of(build_model(ModelConfig(), r, seed=0, device="meta")) for r in (NoReduction(), GroupedReduction())
    ]
    none, grouped = (account(engine, layout, ranks=8, accumulation=1, ema=True) for layout in layouts)
    # FSDP2 deals out rows: a position embedding (1, 197, 768) is padded to one row a rank, in both models.
    tolerance = 0.005 if isinstance(engine, FsdpSettings) else 0.0006
    assert 1 - grouped[1].gradients / none[1].gradients == pytest.approx(0.327, abs=tolerance)
    assert grouped[1].on_the_wire(8) <= 0.678 * none[1].on_the_wire(8)
    assert grouped[0].weights < none[0].weights


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["plan", "--config", QUICKSTART, *arguments])
    return capsys.readouterr().out


def test_the_command_tells_what_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = json.loads(plan(capsys, "--gpus", "2", "--device", "h200", "--json"))
    assert [row["strategy"] for row in told["rows"]] == [
        s for s in ("none", "grouped", "shallow", "thin") for _ in range(5)
    ]
    assert all(row["fits"] and row["largest_micro_batch"] == 32 for row in told["rows"])
    # A device whose memory the model just exceeds, and then just does not, at half of the micro-batch.
    row = next(r for r in told["rows"] if (r["strategy"], r["engine"]) == ("grouped", "FSDP2"))
    device = {**told["device"], "name": "tight", "memory_bytes": row["memory_bytes"] - 1, "usable_memory": 1.0}
    (tmp_path / "tight.json").write_text(json.dumps(device))
    tight = json.loads(plan(capsys, "--gpus", "2", "--device", str(tmp_path / "tight.json"), "--json"))
    row = next(r for r in tight["rows"] if (r["strategy"], r["engine"]) == ("grouped", "FSDP2"))
    assert not row["fits"]
    assert row["largest_micro_batch"] == 16
    assert row["bound_by"] in ("compute", "memory", "link")


def test_the_configs_own_engine_keeps_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    def rows(*settings: str, nodes: int = 1) -> dict[str, Any]:
        told = plan(capsys, "--gpus", "4", "--nodes", str(nodes), "--json", "train.global_batch=128", *settings)
        return {row["engine"]: row for row in json.loads(told)["rows"] if row["strategy"] == "grouped"}

    plain, overlapping = rows(), rows("engine.overlap_comm=true")
    bucket = 4 * int(5e8)  # a second one is filled while the first is reduced
    buffers = [row["ZeRO 1"]["held"]["backward_buffers"] for row in (plain, overlapping)]
    assert buffers[1] - buffers[0] == bucket
    # Shards within a node are gathered over its links, and only gradients cross the network.
    sharded = rows("engine.name=fsdp", "engine.shard_size=2", nodes=2)["HSDP, 2 shards"]
    assert sharded["seconds"]["link"] < rows("engine.name=fsdp", nodes=2)["FSDP2"]["seconds"]["link"] / 2


def test_the_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    told = plan(capsys, "--gpus", "2", "--nodes", "2", "--device", "cpu")
    for part in ("ZeRO 3", "FSDP2", "largest", "bound by", "recompute", "fewer parameters", "Source:"):
        assert part in told


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gpus", "0"], ["--gpus 0", "at least 1"]),
        (["--gpus", "-4"], ["--gpus -4", "at least 1"]),
        (["--gpus", "2", "--nodes", "0"], ["--nodes 0"]),
        (["--gpus", "3", "--nodes", "2"], ["--gpus 3", "--nodes 2"]),
        (["--gpus", "3"], ["train.global_batch", "micro_batch", "3 ranks"]),
        (["--gpus", "2", "--device", "h20"], ["h20", "nearest: h200"]),
        (["--gpus", "2", "--device", "missing.json"], ["missing.json", "cannot be read"]),
        (["--gpus", "2", "train.epoch=3"], ["train.epoch", "nearest: train.epochs"]),
        (["--gpus", "2", "reduction.group_size=4"], ["group_size"]),
        (["--gpus", "4", "engine.name=fsdp", "engine.shard_size=3"], ["engine.shard_size = 3"]),
        (["--gpus", "2", "engine.native.zero_optimization.reduce_bucket_size=x"], ["reduce_bucket_size"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes_end_with_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan(capsys, *arguments)
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    for part in parts:
        assert part in errors


@pytest.mark.parametrize(
    ("content", "part"),
    [("{", "not valid JSON"), ('{"name": "x", "flops": 1}', "unknown key flops"), ('{"name": "x"}', "memory_bytes")],
)
def test_a_bad_device_file_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, part: str
) -> None:
    (tmp_path / "device.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        plan(capsys, "--gpus", "2", "--device", str(tmp_path / "device.json"))
    assert ended.value.code == 2
    assert part in capsys.readouterr().err
