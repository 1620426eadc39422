"""A run that started from pretrained weights: evaluated with its own, resumed without them."""

import json
from pathlib import Path

import pytest

from scalevit.config.loading import load_config
from scalevit.export.source import find_source
from scalevit.training.resume import check_same_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    config = load_config("quickstart", ["model.pretrained=true", "model.initial_weights_set=weights"])
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    (tmp_path / "best.safetensors").touch()
    return tmp_path


def test_its_own_weights_are_evaluated(run_folder: Path) -> None:
    model = find_source(str(run_folder)).config.model
    assert model.weights_source == str(run_folder / "best.safetensors")
    assert (model.pretrained, model.initial_weights_set) == (False, "auto")
    overrides = ["model.initial_weights_set=ema"]
    chosen = find_source(str(run_folder / "best.safetensors"), overrides=overrides).config.model
    assert chosen.initial_weights_set == "ema"


@pytest.mark.parametrize("setting", ["model.pretrained=true", "model.initial_weights=hf-hub:someone/model"])
def test_it_can_be_resumed_without_its_initial_weights(setting: str) -> None:
    before = load_config("quickstart", [setting]).model_dump(mode="json")
    check_same_run(before, load_config("quickstart", []), "run folder runs/quickstart")
