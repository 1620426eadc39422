"""Runs each module of `interpreted/` in a process of its own, with TRITON_INTERPRET=1 from the start."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from launching import SECONDS

MODULES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


def run_module(module: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    # One thread each: two of these run at a time, and the interpreter is numpy on small blocks anyway.
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(module)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=2 * SECONDS)


@pytest.fixture(scope="session")
def finished(request):
    """module -> its result. Two run at a time, unless pytest-xdist already runs tests side by side."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield run_module
        return
    wanted = [item.callspec.params["module"] for item in request.session.items if item.fspath == __file__]
    with ThreadPoolExecutor(2) as pool:
        futures: dict[Path, Future] = {module: pool.submit(run_module, module) for module in wanted}
        yield lambda module: futures[module].result()
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.stem)
def test_interpreted(module: Path, finished) -> None:
    result = finished(module)
    assert result.returncode == 0, f"{result.stdout[-12000:]}\n{result.stderr[-2000:]}"
    assert " passed" in result.stdout, result.stdout
