"""Fixtures for the whole suite."""

from pathlib import Path

import pytest

from scalevit.data import ensure_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits' `train` and `validation` shards."""
    folder = tmp_path_factory.mktemp("digits")
    ensure_digits(folder / "train", folder / "validation")
    return folder
