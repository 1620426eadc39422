"""The JSON schema: current, and with a description for every key."""

import json

from config_keys import config_keys
from scalevit.config.loading import PRESETS
from scalevit.config.schema import json_schema, markdown


def test_the_schema_in_the_repository_is_current() -> None:
    assert json.loads((PRESETS / "schema.json").read_text()) == json_schema(), "run: make schema"


def test_every_key_has_a_description() -> None:
    keys = config_keys()
    assert len(keys) > 100
    assert [key for key, field in keys.items() if not field.get("description", "").strip()] == []


def test_the_page_of_all_settings_is_current_and_names_each() -> None:
    page = (PRESETS.resolve().parent / "docs" / "config.md").read_text()
    assert page == markdown() + "\n", "run: make schema"
    plain = [key for key, field in config_keys().items() if "const" not in field and "properties" not in field]
    assert [key for key in plain if "oneOf" not in config_keys()[key] and f"`{key}`" not in page] == []
