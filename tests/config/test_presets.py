"""Presets are found by name, files by path, and a name that is neither is one line with the nearest preset."""

import json
from pathlib import Path

import pytest

from scalevit.config.loading import find_config, load_config, preset_names
from scalevit.errors import UserError


def refused(config: str, folder: Path = Path()) -> str:
    with pytest.raises(UserError) as error:
        find_config(config, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_shipped_config_but_the_schema_is_a_preset() -> None:
    assert preset_names() == sorted(preset_names())
    assert {"baseline", "grouped", "shallow", "thin", "fsdp", "zero3", "quickstart"} <= set(preset_names())
    assert "schema" not in preset_names()


@pytest.mark.parametrize("config", ["quickstart", "quickstart.json"])
def test_a_preset_is_found_by_name_in_any_folder(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(config).data.builtin == "digits"


def test_a_file_of_the_same_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text('{"seed": 7}')
    assert load_config("quickstart").seed == 7


def test_a_folder_of_the_same_name_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    assert load_config("quickstart").name == "quickstart"


@pytest.mark.parametrize("parent", ["thin", "thin.json"])
def test_a_file_extends_a_preset(parent: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"extends": parent, "seed": 3}))
    config = load_config(path)
    assert (config.seed, config.reduction.strategy) == (3, "thin")


def test_a_parent_beside_the_file_wins_over_a_preset(tmp_path: Path) -> None:
    (tmp_path / "thin.json").write_text('{"seed": 11}')
    (tmp_path / "mine.json").write_text('{"extends": "thin.json"}')
    config = load_config(tmp_path / "mine.json")
    assert (config.seed, config.reduction.strategy) == (11, "none")


def test_an_unknown_name_is_refused_with_the_nearest_preset(tmp_path: Path) -> None:
    for name in ("qickstart", "Quickstart", "configs/qickstart.json"):
        text = refused(name)
        assert name in text
        assert "nearest: quickstart" in text
    assert "is a folder" in refused("sub", _folder(tmp_path / "sub").parent)
    path = tmp_path / "mine.json"
    path.write_text('{"extends": "groupd"}')
    with pytest.raises(UserError, match=r"mine\.json: extends: .*nearest: grouped"):
        load_config(path)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_says_what_it_costs_and_should_reach(name: str) -> None:
    about = json.loads(find_config(name).read_text())["about"]
    assert {"command", "hardware", "time", "top1"} <= set(about)
    assert all(isinstance(text, str) and text for text in about.values())
    assert f"--config {name}" in about["command"] or f"@{name}" in about["command"]
