"""What may change when a run resumes and what must not, by comparing configs."""

from typing import Any

import pytest

from scalevit.config.loading import load_config
from scalevit.errors import UserError
from scalevit.training.resume import check_same_run
from scalevit.training.setting_changes import changed_settings, check_changes, described, effective_changes


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
        (
            ["reduction.strategy=shallow"],
            ["reduction.strategy=shallow", "reduction.blocks=[0,1,2,3,4,5,6,7,8,9,10,11]"],
        ),
        (["model.drop_path=0.3", "model.head_init_bias=-2"], ["model.initial_weights=other.safetensors"]),
        ([], ["engine.name=fsdp", "train.max_steps=9", "optimizer.lr=0.5", "data.workers=0"]),
    ],
    ids=[
        "null group size is 2",
        "scale",
        "explicit groups",
        "select_units",
        "all blocks",
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
        (["reduction.strategy=shallow"], ["reduction.strategy=shallow", "reduction.blocks=[0,1]"], "reduction"),
        ([GROUPED], [GROUPED, "reduction.keep=0.5"], "reduction"),
        ([], ["model.image_size=160"], "model"),
        ([], ["seed=7"], "seed"),
    ],
)
def test_another_structure_or_seed_is_another_run(before: list[str], now: list[str], section: str) -> None:
    with pytest.raises(UserError, match=f"run folder x: was made with another {section} "):
        check_same_run(config(*before), load_config(None, now), "run folder x")


def test_the_message_has_what_differs() -> None:
    with pytest.raises(UserError) as error:
        check_same_run(
            config("model.image_size=32", 'model.kwargs={"depth": 2}'), load_config(None, []), "run folder x"
        )
    assert str(error.value) == (
        "run folder x: was made with another model (model.image_size: 32 then, 224 now, model.kwargs.depth: 2 then, "
        "null now): choose another name, or remove it"
    )


def test_changed_settings_are_listed_by_their_keys() -> None:
    changes = changed_settings(config(), config("optimizer.lr=0.5", "train.max_steps=9", "train.resume=false"))
    assert described(changes) == ["optimizer.lr: 0.001 -> 0.5", "train.max_steps: null -> 9"]
    assert changed_settings(config(), config()) == {}
    assert changed_settings(config(), config("engine.name=fsdp"))["engine.stage"] == (1, None)


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.lr=0.5",
        "optimizer.name=lion",
        "schedule.warmup_epochs=1",
        "loss.label_smoothing=0.2",
        "data.augmentation.mixup=0.5",
        "ema.decay=0.9",
        "model.drop_path=0.3",
        "train.epochs=30",
        "data.validation=elsewhere",
        "data.crop_pct=0.8",
    ],
)
def test_settings_of_the_result_change_only_with_consent(change: str) -> None:
    key = change.partition("=")[0]
    changes = changed_settings(config(), config(change, "data.workers=0"))
    with pytest.raises(UserError, match=rf"^run folder x: .*\({key}: .* -> .*\): undo that, .*\[\"{key}\"\]") as caught:
        check_changes(changes, "refuse", "run folder x")
    assert "data.workers" not in str(caught.value)
    with pytest.raises(UserError, match=key):
        check_changes(changes, ["seed", key[:-1]], "run folder x")
    for allowed in ("allow", [key], [key.rpartition(".")[0]]):
        check_changes(changes, allowed, "run folder x")


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ("optimizer.clip_mode=value", "optimizer.clip_grad=1.0"),
        ("optimizer.lr_scaling=sqrt", "optimizer.lr_base_batch=256"),
        ("optimizer.layer_decay_min_scale=0.1", "optimizer.layer_decay=0.75"),
        ("ema.warmup_gamma=2.0", "ema.warmup=true"),
        ("ema.decay=0.9", ""),
        ("schedule.warmup_lr=0.1", "schedule.warmup_epochs=3"),
        ("evaluation.every_epochs=2", "schedule.name=plateau"),
        ("data.augmentation.repeat_processes=4", "data.augmentation.repeat_order=timm"),
        ("data.augmentation.mixing_group=4", "data.augmentation.repeat_order=timm"),
        ("data.augmentation.mixing_group=4", "data.augmentation.mixup=0.5"),
        ("data.augmentation.erase=after_mixing", "data.augmentation.cutmix=0.5"),
        ("data.augmentation.random_erasing_mode=const", "data.augmentation.random_erasing=0.5"),
    ],
)
def test_a_setting_without_effect_may_be_given_and_may_change(change: str, needed: str) -> None:
    off = ["data.augmentation.mixup=0", "data.augmentation.cutmix=0", "data.augmentation.random_erasing=0"]
    off += ["schedule.warmup_epochs=0", *([] if needed else ["ema.enabled=false"])]
    idle = effective_changes(config(*off), config(*off, change))
    check_changes(idle, "refuse", "run folder x")
    used = [*off, needed] if needed else off[:-1]
    for before, now in (([*used], [*used, change]), (used, [*off, change])):
        with pytest.raises(UserError, match=change.partition("=")[0]):
            check_changes(effective_changes(config(*before), config(*now)), "refuse", "run folder x")


def test_settings_of_another_version_all_have_an_effect() -> None:
    before = {**config(), "optimizer": {"name": "adamw", "momentum": 0.9}}
    assert "optimizer.clip_mode" in effective_changes(before, config("optimizer.clip_mode=value"))


def test_frozen_parameters_never_change() -> None:
    changes = changed_settings(config("optimizer.frozen=backbone"), config())
    with pytest.raises(UserError, match=r'other parameters frozen \(optimizer.frozen: "backbone" -> null\): choose'):
        check_changes(changes, "allow", "run folder x")


def test_settings_of_speed_change_freely() -> None:
    free = ["engine.name=fsdp", "train.max_steps=9", "data.workers=0", "train.micro_batch=3", "train.compile=true"]
    check_changes(changed_settings(config(), config(*free)), "refuse", "run folder x")


def test_settings_that_a_version_did_not_have_are_at_their_defaults() -> None:
    before = load_config("quickstart").model_dump(mode="json")
    for key in ("frozen", "layer_decay_shared", "layer_decay_min_scale"):
        del before["optimizer"][key]
    now = load_config("quickstart").model_dump(mode="json")
    assert changed_settings(before, now) == {}
    assert list(changed_settings(before, {**now, "seed": 7})) == ["seed"]
