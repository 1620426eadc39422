"""Saved under one engine and world size, resumed under another: equal state, and the losses of an undisturbed run."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import resume_worker
from launching import SECONDS, Ranks
from scalevit.engines.deepspeed.checkpoints import is_deepspeed, read_deepspeed
from scalevit.models.build import build_model
from scalevit.training.optimizers import build_optimizer

GROUPS = (1, 2, 4)
ENGINES = {f"zero{stage}": [f"engine.stage={stage}"] for stage in range(4)} | {
    "fsdp": ["engine.name=fsdp"],
    # Two replicas, or on one rank one.
    "hsdp": ["engine.name=fsdp", "engine.shard_size={half}"],
}
CELLS = [(ranks, engine) for ranks in GROUPS for engine in ENGINES]
# Each cell is once a source and once a target of a move to another engine and world size; five stay as they are. All
# pairs are in the slow test.
MOVES = [(cell, CELLS[(number + 8) % len(CELLS)]) for number, cell in enumerate(CELLS)]
STAYS = [(cell, cell) for cell in ((1, "zero0"), (2, "zero1"), (2, "zero3"), (4, "zero2"), (4, "fsdp"))]
STEPS = 10
# These also save in DeepSpeed's own form.
NATIVE = [(2, f"zero{stage}") for stage in range(4)]


def name(cell: tuple[int, str]) -> str:
    return f"{cell[0]}x-{cell[1]}"


def run_groups(
    folder: Path, reductions: dict[str, str], moves: list[tuple[Any, Any]], *, steps: int, seconds: float = 2 * SECONDS
) -> dict[str, Any]:
    """Results of all groups, by "cell" and "source->target".

    Args:
        reductions: of each cell, by its name.
        steps: of a run, of which the first are before the checkpoint.
    """
    cells = [
        {
            "id": name(cell),
            "ranks": cell[0],
            "settings": [setting.format(half=max(1, cell[0] // 2)) for setting in ENGINES[cell[1]]],
            "reduction": reductions[name(cell)],
            "native": cell in NATIVE,
            "steps": steps,
        }
        for cell in CELLS
    ]
    cases = {"groups": GROUPS, "cells": cells, "moves": [(name(source), name(target)) for source, target in moves]}
    (folder / "cases.json").write_text(json.dumps(cases))
    groups = [
        Ranks(ranks, resume_worker.__file__, folder / "cases.json", folder, log=folder / f"{ranks}.log")
        for ranks in GROUPS
    ]
    with ThreadPoolExecutor() as side_by_side:
        list(side_by_side.map(lambda group: group.wait(seconds), groups))
    return {k: v for ranks in GROUPS for k, v in torch.load(folder / f"results-{ranks}.pt", weights_only=True).items()}


def check_move(results: dict[str, Any], source: str, target: str, *, steps: int) -> None:
    undisturbed, resumed = results[source], results[f"{source}->{target}"]
    assert len(resumed["losses"]) == steps - resume_worker.SAVED_AT
    if source == target:
        assert resumed["losses"] == undisturbed["losses"], "bit for bit"
        for key, tensor in undisturbed["tensors"].items():
            assert torch.equal(resumed["tensors"][key], tensor), key
    else:
        # Only the order of summation differs: fp32 rounding, which a few steps of AdamW hardly enlarge.
        assert resumed["losses"] == pytest.approx(undisturbed["losses"], rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return run_groups(folder, {name(cell): "grouped" for cell in CELLS}, MOVES + STAYS, steps=STEPS)


@pytest.mark.parametrize(("source", "target"), MOVES + STAYS, ids=lambda cell: name(cell))
def test_a_run_moves(results: dict[str, Any], source: tuple[int, str], target: tuple[int, str]) -> None:
    check_move(results, name(source), name(target), steps=STEPS)


@pytest.mark.parametrize("cell", NATIVE, ids=name)
def test_deepspeeds_own_form_is_read(results: dict[str, Any], folder: Path, cell: tuple[int, str]) -> None:
    ours = resume_worker.read_alone(folder / name(cell) / f"step-{resume_worker.SAVED_AT:08d}")
    model = build_model(resume_worker.MODEL, resume_worker.REDUCTIONS["grouped"], seed=0)
    names = {id(parameter): own for own, parameter in model.named_parameters()}
    groups = build_optimizer(model, resume_worker.OPTIMIZER).param_groups
    path = folder / f"{name(cell)}-native"
    assert is_deepspeed(path)
    order = [names[id(parameter)] for group in groups for parameter in group["params"]]
    native = read_deepspeed(path, order, set().union(*groups))
    assert native.step == resume_worker.SAVED_AT
    assert native.scalars == {"step": dict.fromkeys(order, torch.tensor(float(resume_worker.SAVED_AT)))}
    parts = {"weights": native.weights, **{f"optimizer.{key}": tensors for key, tensors in native.tensors.items()}}
    assert sorted(parts) == ["optimizer.exp_avg", "optimizer.exp_avg_sq", "weights"]
    for part, tensors in parts.items():
        assert tensors.keys() == set(order)
        for own, tensor in tensors.items():
            assert torch.equal(tensor, ours[f"{part}.{own}"]), (part, own)
    assert native.shapes == {own: parameter.shape for own, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "grouped", "shallow"])
def test_every_move(tmp_path: Path, reduction: str) -> None:
    moves = [(source, target) for source in CELLS for target in CELLS]
    results = run_groups(tmp_path, {name(cell): reduction for cell in CELLS}, moves, steps=24, seconds=3600)
    for source, target in moves:
        check_move(results, name(source), name(target), steps=24)
