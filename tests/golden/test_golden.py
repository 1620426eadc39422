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
def results(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("golden")
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(digits)
    return run_golden(folder)


@pytest.mark.parametrize("name", RUNS)
def test_equal_to_the_recorded_run(golden: Any, results: dict[str, Any], name: str) -> None:
    recorded, ours = golden["runs"][name], results[name]
    if golden["machine"] == golden_machine():
        assert ours == recorded, "bit for bit on the machine that recorded it"
        return
    # fp32 has 24 significant bits, so another order of summation changes the last ones; fp16's products have 11.
    tolerance = 1e-4 if "fp16" in name else 1e-6
    for key in ("losses", "grad_norms"):
        assert ours[key] == pytest.approx(recorded[key], rel=tolerance, abs=tolerance), key
    for key in ("weights", "ema"):
        assert ours[key]["norm"] == pytest.approx(recorded[key]["norm"], rel=tolerance), key
