"""What may change when a run resumes and what must not, by comparing configs."""

from typing import Any

import pytest

from scalevit.config.loading import load_config
from scalevit.errors import UserError
from scalevit.training.resume import changed_settings, check_same_run


def config(*overrides: str) -> dict[str, Any]:
    return load_config(None, overrides).model_dump(mode="json")


GROUPED = "reduction.strategy=grouped"


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ([GROUPED], [GROUPED, "reduction.group_size=2"]),
        ([GROUPED, "reduction.scale=1.0"], [GROUPED]),
        ([GROUPED, "reduction.groups=[[0,1],[2,3],[4,5],[6,7],[8,9],[10,11]]"], [GROUPED]),
        (
            ["reduction.strategy=shallow"],
            ["reduction.strategy=shallow", "reduction.select_units=importance"],
        ),
        (["model.drop_path=0.3"], ["model.initial_weights=other.safetensors"]),
        ([], ["engine.name=fsdp", "train.max_steps=9", "optimizer.lr=0.5", "data.workers=0"]),
    ],
    ids=[
        "null group size is 2",
        "scale",
        "explicit groups",
        "select_units",
        "drop-path and initial weights",
        "engine and training",
    ],
)
def test_what_does_not_change_the_weights_structure_may_change(before: list[str], now: list[str]) -> None:
    check_same_run(config(*before), load_config(None, now), "run folder x")


@pytest.mark.parametrize(
    ("before", "now", "section"),
    [
        ([GROUPED], [GROUPED, "reduction.group_size=3"], "reduction"),
        ([GROUPED], ["reduction.strategy=none"], "reduction"),
        (["reduction.strategy=shallow"], ["reduction.strategy=shallow", "reduction.keep=0.25"], "reduction"),
        ([], ["model.image_size=160"], "model"),
        ([], ["seed=7"], "seed"),
    ],
)
def test_another_structure_or_seed_is_another_run(before: list[str], now: list[str], section: str) -> None:
    with pytest.raises(UserError, match=f"run folder x: was made with another {section} "):
        check_same_run(config(*before), load_config(None, now), "run folder x")


def test_changed_settings_are_listed_by_their_keys() -> None:
    changes = changed_settings(config(), config("optimizer.lr=0.5", "train.max_steps=9"))
    assert changes == ["optimizer.lr: 0.001 -> 0.5", "train.max_steps: None -> 9"]
    assert changed_settings(config(), config()) == []
    assert "engine.stage: 1 -> None" in changed_settings(config(), config("engine.name=fsdp"))
