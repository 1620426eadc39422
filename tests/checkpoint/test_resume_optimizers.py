"""Other optimizers than AdamW: saved under one engine and world size, resumed under another."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import resume_worker
from launching import Ranks
from test_resume_anywhere import ENGINES

GROUPS = (1, 2)
STEPS = 12
# (optimizer, from (ranks, engine), to (ranks, engine)); hsdp holds a copy on each rank at two ranks.
MOVES = [
    ("momentum", (2, "zero1"), (1, "fsdp")),
    ("lion", (1, "zero3"), (2, "zero2")),
    ("nadamw", (2, "fsdp"), (1, "zero1")),
    ("nadam", (2, "zero2"), (2, "fsdp")),
    ("adan", (2, "zero3"), (1, "zero0")),
    ("adan", (1, "zero0"), (2, "zero3")),
    ("lamb", (2, "fsdp"), (1, "zero0")),
    ("muon", (1, "zero0"), (2, "hsdp")),
    ("adafactor", (2, "zero0"), (1, "fsdp")),
]
SCALARS = {"nadam": {"step", "mu_product"}, "adan": {"group.step"}, "lamb": {"group.step"}, "momentum": set()}


def identity(optimizer: str, cell: tuple[int, str]) -> str:
    return f"{optimizer}-{cell[0]}x-{cell[1]}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("optimizers")
    cells = {
        identity(optimizer, cell): {
            "id": identity(optimizer, cell),
            "ranks": cell[0],
            "settings": [setting.format(half=max(1, cell[0] // 2)) for setting in ENGINES[cell[1]]],
            "reduction": "grouped",
            "optimizer": optimizer,
            "steps": STEPS,
        }
        for optimizer, *both in MOVES
        for cell in both
    }
    moves = [(identity(optimizer, source), identity(optimizer, target)) for optimizer, source, target in MOVES]
    cases = {"groups": GROUPS, "cells": list(cells.values()), "moves": moves}
    (folder / "cases.json").write_text(json.dumps(cases))
    groups = [
        Ranks(ranks, resume_worker.__file__, folder / "cases.json", folder, log=folder / f"{ranks}.log")
        for ranks in GROUPS
    ]
    with ThreadPoolExecutor() as side_by_side:
        list(side_by_side.map(lambda group: group.wait(600), groups))
    return {k: v for ranks in GROUPS for k, v in torch.load(folder / f"results-{ranks}.pt", weights_only=True).items()}


@pytest.mark.parametrize(("optimizer", "source", "target"), MOVES, ids=str)
def test_a_run_moves_with_its_optimizer(results: dict[str, Any], optimizer: str, source: Any, target: Any) -> None:
    source_id, target_id = identity(optimizer, source), identity(optimizer, target)
    undisturbed, resumed = results[source_id], results[f"{source_id}->{target_id}"]
    assert len(resumed["losses"]) == STEPS - resume_worker.SAVED_AT
    assert resumed["losses"] == pytest.approx(undisturbed["losses"], rel=1e-5)
    assert resumed["tensors"].keys() == undisturbed["tensors"].keys()
    assert resumed["scalars"] == undisturbed["scalars"]
    if optimizer in SCALARS:
        assert resumed["scalars"].keys() == SCALARS[optimizer]
    if "group.step" in resumed["scalars"]:
        assert set(resumed["scalars"]["group.step"].values()) == {resume_worker.SAVED_AT}
