"""Runs the modules of `interpreted/` in a process of their own, with TRITON_INTERPRET=1 from the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launching import SECONDS

MODULES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory):
    """The process that ran the wanted modules, and the numbers of tests that passed and did not, by module."""
    wanted = {item.callspec.params["module"] for item in request.session.items if item.fspath == __file__}
    results = tmp_path_factory.mktemp("interpreted") / "results.xml"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    # One thread: other tests run beside, and the interpreter is numpy on small blocks anyway.
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    command += [f"--junitxml={results}"]
    command += map(str, sorted(wanted))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3 * SECONDS)
    assert results.exists(), f"{done.stdout[-12000:]}\n{done.stderr[-2000:]}"
    counts = {module.stem: [0, 0] for module in wanted}
    for case in ElementTree.parse(results).iter("testcase"):
        module = next(part for part in case.attrib["classname"].split(".") if part in counts)
        counts[module][any(child.tag in ("failure", "error") for child in case)] += 1
    return done, counts


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.stem)
def test_interpreted(module: Path, finished) -> None:
    done, counts = finished
    passed, failed = counts[module.stem]
    assert passed > failed == 0, f"{done.stdout[-12000:]}\n{done.stderr[-2000:]}"
