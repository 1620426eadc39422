"""docs/differences.md says what gives the paper's behaviour, and the presets `paper/...` set exactly that."""

import json
import re
from pathlib import Path

import pytest

from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.training.setting_changes import changed_settings

PAGE = Path(__file__).parents[2] / "docs/differences.md"
NAMES = ("baseline", "grouped", "shallow", "thin")
REMEDIES = [
    row.split(" | ")[-1].removesuffix(" |")
    for row in PAGE.read_text().splitlines()
    if row.startswith("| ") and not row.startswith("| Matter")
]
SWITCHES = sorted(set(re.findall(r"`(\w+(?:\.\w+)+=[\w.]+)`", " ".join(REMEDIES))))


def value_of(config: Config, key: str) -> object:
    value = config.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


def changes(name: str) -> set[str]:
    """Settings that a preset changes of the one it is made from, as key=value."""
    before, now = (load_config(config).model_dump(mode="json") for config in (name, f"paper/{name}"))
    changed = {key: value for key, (_, value) in changed_settings(before, now).items() if key != "name"}
    return {f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()}


def test_every_difference_has_a_switch_or_says_why_not() -> None:
    assert len(REMEDIES) > 25
    unclear = [text for text in REMEDIES if not re.search(r"^equal by default|^no switch: .|^`[\w.]+=", text)]
    assert unclear == []


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_is_a_setting_of_the_presets(switch: str) -> None:
    key, _, text = switch.partition("=")
    value = json.loads(text) if re.fullmatch(r"[\d.]+|true|false", text) else text
    names = ("grouped",) if key.startswith("reduction.") else NAMES
    assert {name: value_of(load_config(f"paper/{name}"), key) for name in names} == dict.fromkeys(names, value)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_changes_nothing_that_the_page_does_not_name(name: str) -> None:
    changed = changes(name)
    assert changed <= set(SWITCHES)
    assert len(changed) >= 10
    assert ("reduction.scale=0.707" in changed) == (name == "grouped")
