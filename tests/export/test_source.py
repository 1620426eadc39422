"""What the commands are given as trained weights."""

import json
import os
from pathlib import Path

import pytest

from scalevit.export.source import find_source


@pytest.mark.parametrize(("cores", "workers"), [(2, 2), (64, 8)])
def test_an_export_is_not_loaded_by_more_processes_than_cores(
    cores: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    export = tmp_path / "x.pt2"
    export.touch()
    assert find_source(str(export)).config.data.workers == workers
    assert find_source(str(export), overrides=["data.workers=5"]).config.data.workers == 5
    # What a run's config says, or has by default, stays.
    config = tmp_path / "config.json"
    for data, expected in (({"workers": 12}, 12), ({}, 8)):
        config.write_text(json.dumps({"data": data}))
        assert find_source(str(export), config=str(config)).config.data.workers == expected


def test_weights_without_a_config_are_not_evaluated_by_more_processes_than_cores(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((runs / "grouped" / "best.safetensors").read_bytes())
    assert find_source(str(alone), config_required=False).config.data.workers == 2
    assert find_source(str(runs / "grouped")).config.data.workers == 8
