"""Fixtures for the whole suite."""

import os
from pathlib import Path

import pytest

# A single rank takes a thread for each core, and tests run beside each other: threads that wait must not spin, which
# takes several times the CPU time of the work. OpenMP reads this when torch is imported; subprocesses inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# In this order, before all others: a process that had one of them left would work while the others have nothing to do.
LONGEST = [
    Path(__file__).parent / name
    for name in (
        "kernels/test_interpreted.py",
        "training/test_training.py",
        "kernels/test_compile_report.py",
        "training/test_splits.py",
        "engines/test_parity.py",
        "checkpoint/test_killed_runs.py",
        "checkpoint/test_resume_anywhere.py",
        "golden/test_golden.py",
        "cli/test_local_ranks.py",
        "cli/test_sweep_command.py",
        "planning/test_accounting.py",
        "test_extending.py",
    )
]
assert all(file.is_file() for file in LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path) if item.path in LONGEST else len(LONGEST))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits' `train` and `validation` shards."""
    # Here and not above: the kernel tests need torch, Triton and numpy alone.
    from scalevit.data.builtin import ensure_builtin

    folder = tmp_path_factory.mktemp("digits")
    ensure_builtin("digits", folder / "train", folder / "validation")
    return folder
