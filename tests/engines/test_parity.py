"""Engines against plain PyTorch in one process: losses, gradient norms and every final weight, shared MLPs included."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import parity_worker
from cells import (
    FACTORS,
    WIRE_ENGINES,
    Cell,
    Results,
    cell,
    deviations,
    expected_of,
    full_matrix,
    pairwise,
    run_cells,
    wire_cells,
    wire_row,
)
from scalevit.models.meta_init import initial_values

# Every two values of two factors meet in one of these; `-m slow` runs all 216, with more steps.
PRUNED: list[Cell] = [{**one, "steps": 8} for one in pairwise(full_matrix())]
# What the matrix leaves out: clipping, and each engine's own settings.
OTHERS = [
    cell("zero0", 1, clip=0.5, steps=6),
    cell("zero1", 2, "shallow", clip=0.5, steps=6),
    cell("zero2", 2, clip=0.5, steps=6, more=["engine.overlap_comm=true", "engine.offload_optimizer=cpu"]),
    cell("zero3", 2, clip=0.5, steps=6, more=["engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"]),
    cell("fsdp", 2, clip=0.5, steps=6, more=["engine.cpu_offload=true", "engine.prefetch=2"]),
    cell("hsdp", 2, clip=0.5, steps=6),
    *(cell(engine, 2, clip=0.01, clip_mode="value", steps=4) for engine in ("zero1", "zero3", "fsdp")),
    *(cell(engine, 2, clip=0.02, clip_mode="agc", steps=4) for engine in ("zero0", "fsdp")),
    cell("zero1", 2, "shallow", compile="aot_eager", depth=2, steps=6),
    cell("zero3", 2, compile="aot_eager", checkpointing=True, depth=2, steps=6),
    cell("fsdp", 2, compile="inductor", checkpointing=True, depth=2, steps=6),
]
# Calls of the process group in one step of three micro-batches: grouped has 2 units of 2 blocks each, and the root.
_COUNT = {"accumulation": 3, "count": True, "steps": 3}
COUNTED = {
    # Each micro-batch gathers every unit once, and the blocks' a second time in the backward.
    "true": (
        cell("fsdp", 2, **_COUNT, more=["engine.reshard_after_forward=true"]),
        3 * (3 + 2),
    ),
    "false": (cell("fsdp", 2, **_COUNT, more=["engine.reshard_after_forward=false"]), 3),
}
WIRE = wire_cells()
# From this loss scale on the first steps must overflow and be skipped, on all ranks alike, until it has come down.
FP16 = [
    cell(engine, 2, precision="fp16", loss_scale=2.0**28, steps=16)
    for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp")
]
BF16 = [
    cell("zero1", 2, precision="bf16"),
    cell("fsdp", 2, precision="bf16"),
    cell("fsdp", 2, precision="bf16", more=["engine.mixed_precision=policy"]),
    cell("fsdp", 2, precision="bf16-weights", steps=3),
]
META = [cell(engine, 2, meta_init=True, steps=2) for engine in ("fsdp", "hsdp", "zero3")] + [
    cell("fsdp", 1, "shallow", meta_init=True, steps=2, more=["engine.cpu_offload=true"]),
    cell("zero3", 1, "shallow", meta_init=True, steps=2),
]
EXACT = PRUNED + OTHERS + [one for one, _ in COUNTED.values()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_cells(EXACT + WIRE + META + FP16 + BF16, tmp_path_factory.mktemp("cells"))


def assert_equal_to_one_process(one: Cell, ours: dict[str, Any]) -> None:
    # fp32: only the order of summation differs.
    for what, deviation in deviations(ours, expected_of(one)).items():
        assert deviation < 1e-5, f"{what} deviates by {deviation:.1e}"
    assert ours["optimizer_steps"] == one.get("steps", parity_worker.STEPS)


def identity(one: Cell) -> str:
    return one["id"]


@pytest.mark.parametrize("one", EXACT, ids=identity)
def test_an_engine_equals_one_process(results: Results, one: Cell) -> None:
    assert_equal_to_one_process(one, results[one["id"]])


@pytest.mark.slow
def test_the_full_matrix_equals_one_process(tmp_path: Path) -> None:
    cells = full_matrix()
    everything = run_cells(cells, tmp_path)
    for one in cells:
        assert_equal_to_one_process(one, everything[one["id"]])


def test_pruning_keeps_every_pair() -> None:
    assert len(PRUNED) < 30
    for one, other in itertools.combinations(FACTORS, 2):
        met = {(cell[one], cell[other]) for cell in PRUNED}
        assert met == set(itertools.product(FACTORS[one], FACTORS[other])), (one, other)


@pytest.mark.parametrize("reshard", COUNTED)
def test_fsdp_gathers_a_shared_mlp_once_and_reduces_it_once_per_step(results: Results, reshard: str) -> None:
    one, gathers = COUNTED[reshard]
    wire = results[one["id"]]["wire"]
    assert wire["allgather"]["calls"] == gathers
    assert wire["reduce_scatter"]["calls"] == 3, "one per unit, with the last micro-batch"
    # All parameters once, in fp32, half of them to the other rank; rows that do not divide by the ranks are padded.
    assert wire["reduce_scatter"]["bytes"] == pytest.approx(results[one["id"]]["parameters"] * 4 / 2, rel=0.02)


@pytest.mark.parametrize("engine", WIRE_ENGINES)
def test_grouped_sends_as_much_less_as_it_has_fewer_parameters(results: Results, engine: str) -> None:
    row = wire_row(engine, WIRE, results)
    assert row["parameter_ratio"] < 0.7, "the model says something about sharing"
    assert row["bytes_ratio"] == pytest.approx(row["parameter_ratio"], rel=0.01), row


@pytest.mark.parametrize("one", META, ids=identity)
def test_initial_values_depend_on_no_engine_and_no_world_size(results: Results, one: Cell) -> None:
    ours, config = results[one["id"]], parity_worker.model_config()
    expected = dict(initial_values(config, parity_worker.REDUCTIONS[one["reduction"]], seed=parity_worker.SEED))
    assert ours["initial"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours["initial"][name], tensor), name
    assert all(0 < norm < float("inf") for norm in ours["norms"]), "and it trains"


@pytest.mark.parametrize("one", FP16, ids=identity)
def test_fp16_skips_steps_that_overflow(results: Results, one: Cell) -> None:
    ours = results[one["id"]]
    finite = [norm for norm in ours["norms"] if norm < float("inf")]
    assert 0 < len(finite) < len(ours["norms"])
    assert ours["skipped"] == len(ours["norms"]) - len(finite)
    assert ours["optimizer_steps"] == len(finite), "a skipped step is no optimizer step"
    # The gradient that passes is the unscaled one; fp16 has 11 significant bits, and errors add up over the layers.
    expected = expected_of(one, skipped=ours["skipped"])["norms"][ours["skipped"] :]
    assert finite == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("one", BF16, ids=identity)
def test_bf16_stays_near_fp32(results: Results, one: Cell) -> None:
    # 8 significant bits (0.4 %) in every operation; the reduction of gradients stays fp32, and mostly the weights.
    assert deviations(results[one["id"]], expected_of(one))["loss"] < 0.02
