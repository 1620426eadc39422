"""A run's numbers depend on neither the number of ranks nor the micro-batch. The whole table is in `splits.py`."""

from pathlib import Path
from typing import Any

import pytest
from splits import REFERENCE, Cell, deviations, run_cells, whole_table

# Each engine, with numbers that divide the global batch of 40 and that do not.
CELLS = [
    Cell("zero1", 3, "5"),
    Cell("zero3", 5, "2"),
    Cell("fsdp", 8, "auto"),
    Cell("fsdp", 3, "1", "recomputed"),
]
# fp32 rounds at 6e-8; the order of summation differs, and 24 steps enlarge it.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, dict[str, Any]]:
    return run_cells([REFERENCE, *CELLS], tmp_path_factory.mktemp("splits"))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_equal_to_one_process(results: dict[Cell, dict[str, Any]], cell: Cell) -> None:
    for key, deviation in deviations(results[cell], results[REFERENCE]).items():
        assert deviation < TOLERANCE, key


@pytest.mark.slow
def test_the_whole_table(tmp_path: Path) -> None:
    results = run_cells([REFERENCE, *whole_table()], tmp_path)
    for cell in whole_table():
        assert max(deviations(results[cell], results[REFERENCE]).values()) < TOLERANCE, cell.name
