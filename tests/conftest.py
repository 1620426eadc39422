"""Fixtures for the whole suite."""

import os
from pathlib import Path

import pytest

# A single rank takes a thread for each core, and tests run beside each other: threads that wait must not spin, which
# takes several times the CPU time of the work. OpenMP reads this when torch is imported; subprocesses inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits' `train` and `validation` shards."""
    # Here and not above: the kernel tests need torch, Triton and numpy alone.
    from scalevit.data.builtin import ensure_digits

    folder = tmp_path_factory.mktemp("digits")
    ensure_digits(folder / "train", folder / "validation")
    return folder
