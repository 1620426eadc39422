"""Activations counted on shapes against those of the real model."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from launching import SECONDS, environment
from scalevit.config.model import ModelConfig
from scalevit.models.build import build_model
from scalevit.models.costs import model_costs
from scalevit.models.mlps import mlp_views, transformer_blocks
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.planning.activations import Mode, TracedModel, saved_bytes, storage_key

SMALL = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=16,
    num_classes=5,
    drop_path=0.1,
    kwargs={"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2},
)
GATED = {  # packed, and separate gate and value
    "packed": SMALL.model_copy(update={"name": "vit_giant_patch14_dinov2"}),
    "separate": SMALL.model_copy(update={"name": "vit_small_plus_patch16_dinov3"}),
}
BATCH = 4


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
    traced = TracedModel(SMALL, reduction, mode="eager", precision=precision, activation_checkpointing=checkpointing)
    assert traced.saved_bytes(BATCH) == saved.bytes


def test_activations_of_the_fused_mlp_are_those_of_the_kernels() -> None:
    """Triton's interpreter runs them, in a process of its own."""
    script = """
import json, torch
from scalevit.config.model import KernelsConfig
from scalevit.models.build import build_model
from scalevit.models.fused_mlp import fuse_mlps
from scalevit.planning.activations import saved_bytes
from test_activations import GATED, SMALL, GroupedReduction
result = []
for kind, config in {"plain": SMALL, **GATED}.items():
    for mode in ("fast", "lean", "recompute"):
        model = build_model(config, GroupedReduction(), seed=0).train()
        fuse_mlps(model, KernelsConfig(mlp="triton", save=mode), torch.device("cpu"))
        with saved_bytes(model) as saved:
            torch.nn.functional.cross_entropy(model(torch.randn(1, 3, 16, 16)), torch.rand(1, 5))
        result.append((kind, mode, saved.bytes))
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
    for kind, mode, size in json.loads(outcome.stdout.splitlines()[-1]):
        settings: Any = {"mode": mode, "precision": "fp32", "activation_checkpointing": False}
        assert TracedModel({"plain": SMALL, **GATED}[kind], GroupedReduction(), **settings).saved_bytes(1) == size, mode


def test_save_modes_differ_by_bytes_per_hidden_unit_and_token() -> None:
    settings: Any = {"precision": "bf16", "activation_checkpointing": False}
    saved = {
        mode: TracedModel(SMALL, NoReduction(), mode=mode, **settings).saved_bytes(BATCH)
        for mode in ("fast", "lean", "recompute")
    }
    hidden = BATCH * 4 * 17 * 128  # micro-batch, blocks, tokens, units
    assert saved["fast"] - saved["lean"] == 2 * hidden
    assert saved["lean"] - saved["recompute"] == 2 * hidden


def test_only_the_recompute_mode_computes_fc1_again() -> None:
    settings: Any = {"precision": "bf16", "activation_checkpointing": False}
    flops = {
        mode: TracedModel(SMALL, NoReduction(), mode=mode, **settings).trace(BATCH).flops
        for mode in ("fast", "lean", "recompute")
    }
    assert flops["lean"] == flops["fast"]
    assert flops["recompute"] - flops["fast"] == BATCH * 4 * 17 * 2 * 32 * 128  # blocks, tokens, 2 FLOPs, fc1


@pytest.mark.parametrize("kind", GATED)
def test_gated_mlps_have_the_flops_of_pytorch(kind: str) -> None:
    settings: Any = {"precision": "bf16", "activation_checkpointing": False}
    eager, fast, again = (
        TracedModel(GATED[kind], NoReduction(), mode=mode, **settings).trace(BATCH).flops
        for mode in ("eager", "fast", "recompute")
    )
    assert fast == eager
    view = mlp_views(build_model(GATED[kind], NoReduction(), seed=0, device="meta"))[0][0]
    tokens = 21 if kind == "separate" else 17  # DINOv3 has four registers
    assert again - fast == BATCH * 4 * tokens * 2 * view.width * 2 * view.hidden  # gate and value


def test_flops_are_those_of_describe() -> None:
    plain, again = (
        TracedModel(ModelConfig(), NoReduction(), mode="fast", precision="bf16", activation_checkpointing=checkpointing)
        .trace(BATCH)
        .flops
        / BATCH
        for checkpointing in (False, True)
    )
    known = model_costs(ModelConfig(), NoReduction()).training_flops
    # Attention's backward computes QK^T a second time, which the usual three passes leave out.
    assert plain == pytest.approx(known, rel=0.01)
    assert again / plain == pytest.approx(4 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("reduction", "mode", "checkpointing"),
    [
        (NoReduction(), "eager", False),
        (GroupedReduction(), "fast", False),
        (GroupedReduction(), "recompute", True),
        (ShallowReduction(), "lean", False),
        (ShallowReduction(), "eager", True),
    ],
    ids=lambda value: getattr(value, "strategy", value),
)
def test_costs_of_any_size_follow_from_two_sizes(reduction, mode: Mode, checkpointing: bool) -> None:
    traced = TracedModel(SMALL, reduction, mode=mode, precision="bf16", activation_checkpointing=checkpointing)
    for images in (1, 2, 5, 4096):
        assert traced.costs(images) == traced.trace(images)


def test_storage_keys_are_equal_for_views_and_different_for_storages_without_data() -> None:
    """`storage_key` uses a private name of torch; this fails if its meaning changes."""
    tensor, other = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    assert storage_key(tensor) == storage_key(tensor[1:]) == storage_key(tensor.untyped_storage())
    assert storage_key(tensor) != storage_key(other)
