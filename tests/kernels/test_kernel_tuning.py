"""Tables and plans: what is shipped parses, and what is malformed is named."""

import json

import pytest
import torch

from scalevit.kernels import tuning

SHIPPED = sorted(tuning.TABLES.glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_tables_parse(path):
    table = tuning.read_table(path)
    assert set(table.default) == set(tuning.SAVES)
    # Nobody has measured yet; a table with numbers must say where they come from.
    assert table.measured is not None or not table.entries
    for plan in table.default.values():
        assert tuning.Plan.parse(plan.as_json(), "again") == plan


def test_an_unknown_device_takes_the_fall_back(monkeypatch):
    monkeypatch.delenv("SCALEVIT_TUNING", raising=False)
    assert tuning.table_path("gfx1100").stem == "fallback"
    assert tuning.table_path("sm_90").stem == "sm_90"
    assert tuning.table_path("sm_86").stem == "sm_89"


def test_a_users_table_comes_first(monkeypatch, tmp_path):
    (tmp_path / "sm_90.json").write_text((tuning.TABLES / "sm_90.json").read_text())
    monkeypatch.setenv("SCALEVIT_TUNING", str(tmp_path))
    assert tuning.table_path("sm_90").parent == tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("default"), "default is missing"),
        (lambda t: t["default"].pop("lean"), r"default\.lean is missing"),
        (lambda t: t["default"]["fast"].update(fc3="library"), r"default\.fast: unknown piece 'fc3'"),
        (lambda t: t["default"]["fast"].update(fc1="cublas"), r'default\.fast\.fc1: must be "library"'),
        (lambda t: t["default"]["fast"]["fc1"].update(wraps=4), r"fc1: unknown key 'wraps'"),
        (lambda t: t["default"]["fast"]["fc1"].update(warps="4"), r"fc1\.warps: must be int; got '4'"),
        (lambda t: t["default"]["fast"]["fc1"].pop("block_k"), r"fc1: block_k is missing"),
        (lambda t: t["entries"].append({"sms": 132}), r"entries\[0\]\.tokens is missing"),
    ],
)
def test_a_malformed_table_is_named(tmp_path, change, message):
    table = json.loads((tuning.TABLES / "sm_90.json").read_text())
    change(table)
    (tmp_path / "t.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=rf"t\.json: .*{message}"):
        tuning.read_table(tmp_path / "t.json")


def test_what_is_not_json_is_named(tmp_path):
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ValueError, match=r"t\.json: not JSON"):
        tuning.read_table(tmp_path / "t.json")


def test_a_measured_entry_serves_its_bucket():
    plan = tuning.Plan(fc1=tuning.Tile(64, 64, 32))
    entry = {"sms": 132, "tokens": 65536, "d": 768, "h": 3072, "save": "fast", "plan": plan}
    default = dict.fromkeys(tuning.SAVES, tuning.LIBRARY)
    table = tuning.Table("test", None, default, {}, (entry,))
    assert table.plan(132, 50432, 768, 3072, "fast") is plan
    for other in (
        (78, 50432, 768, 3072, "fast"),
        (132, 1000, 768, 3072, "fast"),
        (132, 50432, 768, 1536, "fast"),
    ):
        assert table.plan(*other) is tuning.LIBRARY


@pytest.mark.parametrize(("tokens", "bucket"), [(0, 1), (1, 1), (2, 2), (50432, 65536), (65536, 65536)])
def test_buckets(tokens, bucket):
    assert tuning.token_bucket(tokens) == bucket


def test_plans_are_found_by_dtype_and_override():
    x = torch.zeros(3, 16)
    assert tuning.find_plan(x, 32, "fast") is tuning.INTERPRETER
    with tuning.use_plan(tuning.LIBRARY):
        assert tuning.find_plan(x, 32, "fast") is tuning.LIBRARY
    assert tuning.find_plan(x, 32, "fast") is tuning.INTERPRETER
