"""A trained model of each strategy."""

from pathlib import Path

import pytest

from trained_runs import STRATEGIES, write_run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each strategy."""
    folder = tmp_path_factory.mktemp("runs")
    for strategy in STRATEGIES:
        write_run(folder / strategy, strategy)
    return folder
