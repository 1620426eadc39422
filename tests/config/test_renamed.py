"""Keys of earlier versions are refused with their new names."""

import pytest

from config_keys import config_keys
from scalevit.config import renamed
from scalevit.config.loading import load_config
from scalevit.errors import UserError


def refused(override: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("old", "new"), renamed._RENAMED.items())
def test_an_old_key_is_refused_with_the_new_one(old: str, new: str) -> None:
    assert refused(f"{old}=1") == f"config: {old} was renamed to {new}"


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_the_old_wandb_switch_is_refused(mode: str) -> None:
    text = refused(f"tracking.wandb={mode}")
    assert f"tracking.wandb = '{mode}'" in text
    assert "tracking.wandb.enabled" in text
    assert "tracking.wandb.mode" in text


@pytest.mark.parametrize(("old", "new"), renamed._RENAMED.items())
def test_new_names_exist_and_old_ones_do_not(old: str, new: str) -> None:
    keys = config_keys()
    assert old not in keys
    assert new in keys or new.startswith("optimizer.args."), "arguments are not listed in the schema"
