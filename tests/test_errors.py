"""How a room's errors become messages with config keys."""

import pytest

from scalevit.errors import SettingError, UserError, naming_settings, nearest_hint, require, settings_of


@pytest.mark.parametrize(
    ("argument", "keys", "message"),
    [
        ("micro_batch", {"micro_batch": "train.micro_batch"}, "config: train.micro_batch = 3: must be even"),
        ("model.depth", {"model": "model"}, "config: model.depth = 3: must be even"),
        ("model.kwargs.depth", {"model": "teacher"}, "config: teacher.kwargs.depth = 3: must be even"),
        ("depth", {"model": "model"}, "depth = 3: must be even"),
    ],
)
def test_settings_are_named_by_their_keys(argument: str, keys: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error, naming_settings(keys):
        raise SettingError(argument, 3, "must be even")
    assert str(error.value) == message


def test_a_section_is_named_before_its_fields() -> None:
    with pytest.raises(SettingError, match=r"^reduction\.scale = -1: must be positive$"), settings_of("reduction"):
        raise SettingError("scale", -1, "must be positive")


def test_a_hint_names_the_nearest_valid_name_or_nothing() -> None:
    assert nearest_hint("trian", ["train", "plan"]) == "; nearest: train"
    assert nearest_hint("EPOCH", iter(["Epochs", "seed"]), prefix="train.") == "; nearest: train.Epochs"
    assert nearest_hint("xyz", ["train", "plan"]) == nearest_hint("xyz", []) == ""
    assert nearest_hint("trian", ["train"], cutoff=0.95) == ""


def test_a_missing_package_is_one_line_with_its_extra() -> None:
    require("json", extra="nothing")
    with pytest.raises(UserError) as error:
        require("no_such_package", extra="wandb")
    assert str(error.value) == (
        "the package 'no_such_package' is not installed; install the extra: pip install 'scalevit[wandb]', "
        "or in a checkout pip install -e '.[wandb]'"
    )
