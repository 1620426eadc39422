"""Other optimizers than AdamW on every engine where they may run, against one process; where they may not, one line."""

import pytest

from cells import Cell, Results, cell, deviations, expected_of, run_cells
from parity_worker import OPTIMIZERS

STEPS, DEPTH = 4, 2
SHARDED = ("zero1", "zero2", "zero3")
ENGINES = {
    "momentum": ("zero0", *SHARDED, "fsdp"),
    "lion": ("zero0", *SHARDED, "fsdp"),
    "nadamw": ("zero0", *SHARDED, "fsdp"),
    "adan": ("zero0", *SHARDED, "fsdp"),
    "lamb": ("zero0", "fsdp"),
    # hsdp: at two ranks each holds a copy.
    "muon": ("zero0", "hsdp"),
    "adafactor": ("zero0", "hsdp"),
}
# At two ranks all of them; at one rank Adan, which counts steps in its groups, on all engines, the others on one each.
CELLS = [
    cell(engine, 2, optimizer=name, steps=STEPS, depth=DEPTH) for name, engines in ENGINES.items() for engine in engines
] + [
    cell(engine, 1, optimizer=name, steps=STEPS, depth=DEPTH)
    for number, (name, engines) in enumerate(ENGINES.items())
    for engine in (engines if name == "adan" else [engines[number % len(engines)]])
]


# Reads norms, which shards would allow, but with operations that they do not have.
REFUSED = cell("fsdp", 2, optimizer="novograd", refused=True, depth=DEPTH)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_cells([*CELLS, REFUSED], tmp_path_factory.mktemp("optimizers"))


@pytest.mark.parametrize("one", CELLS, ids=lambda one: one["id"])
def test_an_optimizer_computes_as_in_one_process(results: Results, one: Cell) -> None:
    ours, expected = results[one["id"]], expected_of(one)
    assert len(ours["losses"]) == STEPS
    # fp32: only the order of summation differs. Muon orthogonalises in bf16, five times in turn, which makes several
    # percent of an update of rounding noise in the gradient; here all updates together are 7e-4 of the weights.
    limit = 1e-4 if one["optimizer"] == "muon" else 1e-5
    for what, deviation in deviations(ours, expected).items():
        assert deviation < limit, f"{what} deviates by {deviation:.1e}"
    moved = max((expected["weights"][name] - tensor).abs().max().item() for name, tensor in ours["initial"].items())
    assert moved > 3 * OPTIMIZERS[one["optimizer"]].lr / 10, "it trains"


def test_an_optimizer_that_fails_on_shards_is_refused_before_the_first_step(results: Results) -> None:
    message = results[REFUSED["id"]]["refused"]
    assert message.startswith("optimizer NvNovoGrad cannot step FSDP2's shards (")
    assert message.endswith("; one shard works")
    assert "\n" not in message
