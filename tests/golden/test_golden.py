"""Nothing that is not meant to change numerics changes a loss, a gradient norm or a weight."""

import json
from pathlib import Path
from typing import Any

import pytest

from golden_runs import GOLDEN, RUNS, golden_machine, run_golden


@pytest.fixture(scope="module")
def golden() -> Any:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_golden(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", RUNS)
def test_equal_to_the_recorded_run(golden: Any, results: dict[str, Any], name: str) -> None:
    recorded, ours = golden["runs"][name], results[name]
    if golden["machine"] == golden_machine():
        assert ours == recorded, "bit for bit on the machine that recorded it"
        return
    for key in ("losses", "grad_norms"):
        assert ours[key] == pytest.approx(recorded[key], rel=1e-6, abs=1e-6), key
    for key in ("weights", "ema"):
        assert ours[key]["norm"] == pytest.approx(recorded[key]["norm"], rel=1e-6), key
