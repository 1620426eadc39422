"""A run's numbers depend on neither the number of ranks nor the micro-batch. The whole table is in `splits.py`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from splits import REFERENCE, SETTINGS, Cell, arguments, deviations, result, run_cell, run_cells, whole_table

from launching import EVALUATE, QUICKSTART, Workplace, metrics

STEPS = 12
# Each engine, with numbers that divide the global batch of 20 and that do not.
CELLS = [
    Cell("zero1", 3, "5"),
    Cell("zero3", 5, "2"),
    Cell("fsdp", 6, "auto"),
    Cell("fsdp", 3, "1", "recomputed"),
]
# fp32 rounds at 6e-8; the order of summation differs, and steps enlarge it.
TOLERANCE = 1e-5

# Each of them in 4 steps, against the same task in one process.
TASKS = [
    Cell(engine, ranks, micro_batch, task)
    for task in ("distilled", "nested")
    for engine, ranks, micro_batch in (("zero3", 2, "5"), ("fsdp", 3, "4"))
]

SAVED = Cell("zero1", 4, "4")
RESUMED = [Cell("zero1", 3, "auto"), Cell("fsdp", 6, "2"), Cell("zero3", 5, "5")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Workplace:
    folder = tmp_path_factory.mktemp("splits")
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(digits)
    return Workplace(folder)


@pytest.fixture(scope="module")
def reference(workplace: Workplace) -> dict[str, Any]:
    return run_cell(workplace, REFERENCE, steps=STEPS)


@pytest.fixture(scope="module")
def saved(workplace: Workplace) -> Path:
    """A run of half the steps on four ranks."""
    run_cell(workplace, SAVED, steps=STEPS // 2)
    return workplace.folder / "runs" / SAVED.name


@pytest.fixture(scope="module")
def task_references(workplace: Workplace) -> dict[str, Any]:
    """By task: one process, one micro-batch."""
    cells = {cell.variant: replace(REFERENCE, variant=cell.variant) for cell in TASKS}
    return {task: run_cell(workplace, cell, steps=4) for task, cell in cells.items()}


def assert_equal(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, deviation in deviations(ours, expected).items():
        assert deviation < TOLERANCE, key


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_equal_to_one_process(workplace: Workplace, reference: dict[str, Any], cell: Cell) -> None:
    assert_equal(run_cell(workplace, cell, steps=STEPS), reference)


@pytest.mark.parametrize("cell", TASKS, ids=lambda cell: cell.name)
def test_a_task_equals_one_process(workplace: Workplace, task_references: dict[str, Any], cell: Cell) -> None:
    """With a teacher that the ranks share, and with several passes per micro-batch."""
    assert_equal(run_cell(workplace, cell, steps=4), task_references[cell.variant])


@pytest.mark.parametrize("cell", RESUMED, ids=lambda cell: cell.name)
def test_a_run_of_four_ranks_resumes_on_any_number(
    workplace: Workplace, reference: dict[str, Any], saved: Path, cell: Cell
) -> None:
    shutil.copytree(saved, workplace.folder / "runs" / cell.name)
    resumed = run_cell(workplace, cell, steps=STEPS)
    assert f"resuming runs/{cell.name} at step {STEPS // 2}" in workplace.log(cell.name)
    assert_equal(resumed, reference)


def test_trial_steps_leave_the_run_as_it_is(workplace: Workplace, reference: dict[str, Any]) -> None:
    """By the estimate, two ranks have memory for all their 10 rows; rank 0 really has it for 2."""
    cell = Cell("zero1", 2, "auto")
    script = str(Path(__file__).with_name("limited_memory.py"))
    for steps in (STEPS // 2, STEPS):
        done = workplace.run(
            "limited", ["1000000000000", "2", *arguments(cell, steps=steps), "name=limited"], ranks=2, script=script
        )
        assert done.status == 0, done.output[-3000:]
    # Found once, and used again at resume.
    assert done.output.count("train.micro_batch = auto: 2 images per forward pass (estimated: 10)") == 1
    assert f"at step {STEPS // 2}" in done.output
    run = workplace.folder / "runs" / "limited"
    assert json.loads((run / "micro_batch.json").read_text())["micro_batch"] == 2
    assert_equal(result(run, STEPS), reference)


def test_evaluation_on_any_number_of_ranks(workplace: Workplace, reference: dict[str, Any]) -> None:
    """Whatever the training batch: one of a single image is no limit."""
    run = workplace.folder / "runs" / REFERENCE.name
    expected = metrics(run, "evaluation")[-1]
    settings = [*SETTINGS, f"model.initial_weights={run}/final.safetensors", "train.global_batch=1"]
    for ranks in (1, 3, 7):
        done = workplace.run(f"on{ranks}", ["--config", QUICKSTART, *settings], ranks=ranks, script=EVALUATE)
        assert done.status == 0, done.output[-3000:]
        found = json.loads(done.output.splitlines()[-1])
        assert found["top1"] == expected["top1"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)


@pytest.mark.slow
def test_the_whole_table(tmp_path: Path) -> None:
    results = run_cells([REFERENCE, *whole_table()], tmp_path)
    for cell in whole_table():
        assert_equal(results[cell], results[REFERENCE])
