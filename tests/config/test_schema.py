"""The JSON schema: current, and with a description for every key."""

import json

from config_keys import config_keys
from scalevit.config.loading import PRESETS
from scalevit.config.schema import json_schema


def test_the_schema_in_the_repository_is_current() -> None:
    assert json.loads((PRESETS / "schema.json").read_text()) == json_schema(), "run: make schema"


def test_every_key_has_a_description() -> None:
    keys = config_keys()
    assert len(keys) > 100
    assert [key for key, field in keys.items() if not field.get("description", "").strip()] == []
