"""Parameters that are not trained, on every engine: training, and optimizer state that goes into another engine."""

import pytest
import torch

from cells import Cell, Results, cell, deviations, expected_of, run_cells

# Outside of the blocks, and a part of one.
FROZEN = ["patch_embed", "pos_embed", "blocks.0.norm1"]
SETTINGS = {"frozen": FROZEN, "steps": 6, "moved": 2, "depth": 2}
CELLS = [
    *(cell(engine, 2, **SETTINGS) for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp", "hsdp")),
    cell("zero3", 2, more=["engine.native.zero_optimization.stage3_param_persistence_threshold=0"], **SETTINGS),
    cell("fsdp", 2, optimizer="adan", **SETTINGS),
    cell("zero3", 2, optimizer="adan", **SETTINGS),
    cell("zero2", 2, optimizer="undecayed", **SETTINGS),
    cell("fsdp", 2, optimizer="undecayed", **SETTINGS),
]
META = [cell(engine, 2, meta_init=True, **SETTINGS) for engine in ("zero3", "fsdp")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_cells(CELLS + META, tmp_path_factory.mktemp("frozen"))


@pytest.mark.parametrize("one", CELLS, ids=lambda one: one["id"])
def test_training_with_frozen_parameters_equals_one_process(results: Results, one: Cell) -> None:
    ours, expected = results[one["id"]], expected_of(one)
    for what, deviation in deviations(ours, expected).items():
        assert deviation < 1e-5, f"{what} deviates by {deviation:.1e}"


@pytest.mark.parametrize("one", CELLS + META, ids=lambda one: one["id"])
def test_exactly_the_frozen_parameters_keep_their_values(results: Results, one: Cell) -> None:
    initial, weights = (results[one["id"]][when] for when in ("initial", "weights"))
    kept = {name for name, tensor in weights.items() if torch.equal(tensor, initial[name])}
    assert kept == {name for name in weights if name.startswith(tuple(FROZEN))}
