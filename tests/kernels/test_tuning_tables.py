"""Tables and plans: what is shipped parses, and what is malformed is named."""

import json

import pytest
import torch

from scalevit.kernels.tuning import tables

SHIPPED = sorted(tables.TABLES.glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_tables_parse(path):
    table = tables.read_table(path)
    assert set(table.default) == set(tables.SAVES)
    # A table with measured entries must name the device, versions and date.
    assert table.measured is not None or not table.entries
    for plan in table.default.values():
        assert tables.KernelPlan.parse(plan.as_json(), "again") == plan


def test_an_unknown_device_takes_the_fall_back(monkeypatch):
    monkeypatch.delenv("SCALEVIT_TUNING", raising=False)
    assert tables.table_path("gfx1100").stem == "fallback"
    assert tables.table_path("sm_90").stem == "sm_90"
    assert tables.table_path("sm_86").stem == "sm_89"


def test_a_users_table_comes_first(monkeypatch, tmp_path):
    (tmp_path / "sm_90.json").write_text((tables.TABLES / "sm_90.json").read_text())
    monkeypatch.setenv("SCALEVIT_TUNING", str(tmp_path))
    assert tables.table_path("sm_90").parent == tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("default"), "default is missing"),
        (lambda t: t["default"].pop("lean"), r"default\.lean is missing"),
        (lambda t: t["default"]["fast"].update(fc3="library"), r"default\.fast: unknown product 'fc3'"),
        (lambda t: t["default"]["fast"].update(fc1="cublas"), r'default\.fast\.fc1: must be "library"'),
        (lambda t: t["default"]["fast"]["fc1"].update(wraps=4), r"fc1: unknown key 'wraps'"),
        (lambda t: t["default"]["fast"]["fc1"].update(warps="4"), r"fc1\.warps: must be int; got '4'"),
        (lambda t: t["default"]["fast"]["fc1"].pop("block_k"), r"fc1: block_k is missing"),
        (lambda t: t["entries"].append({"sms": 132}), r"entries\[0\]\.tokens is missing"),
    ],
)
def test_a_malformed_table_is_named(tmp_path, change, message):
    table = json.loads((tables.TABLES / "sm_90.json").read_text())
    change(table)
    (tmp_path / "t.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=rf"t\.json: .*{message}"):
        tables.read_table(tmp_path / "t.json")


def test_what_is_not_json_is_named(tmp_path):
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ValueError, match=r"t\.json: not JSON"):
        tables.read_table(tmp_path / "t.json")


def test_a_measured_entry_serves_its_bucket():
    plan = tables.KernelPlan(fc1=tables.Tile(64, 64, 32))
    entry = {"sms": 132, "tokens": 65536, "d": 768, "h": 3072, "save": "fast", "plan": plan}
    default = dict.fromkeys(tables.SAVES, tables.LIBRARY)
    table = tables.Table("test", None, default, {}, (entry,))
    assert table.plan(132, 50432, 768, 3072, "fast") is plan
    for other in (
        (78, 50432, 768, 3072, "fast"),
        (132, 1000, 768, 3072, "fast"),
        (132, 50432, 768, 1536, "fast"),
    ):
        assert table.plan(*other) is tables.LIBRARY


@pytest.mark.parametrize(("tokens", "bucket"), [(0, 1), (1, 1), (2, 2), (50432, 65536), (65536, 65536)])
def test_buckets(tokens, bucket):
    assert tables.token_bucket(tokens) == bucket


def test_a_plan_is_found_by_device():
    x = torch.zeros(3, 16)
    assert tables.find_plan(x, 32, "fast") is tables.INTERPRETER


def test_gated_mlps_have_tables_of_their_own(monkeypatch, tmp_path):
    """For every device that has a table; a user's folder may have one kind, the shipped table serves the other."""
    monkeypatch.delenv("SCALEVIT_TUNING", raising=False)
    plain = {path.stem for path in SHIPPED if tables.GATED not in path.name}
    assert {tables.table_path(name, gated=True).stem for name in plain} == {name + tables.GATED for name in plain}
    assert tables.table_path("gfx1100", gated=True).stem == "fallback.gated"
    assert tables.table_path("sm_86", gated=True).stem == "sm_89.gated"
    assert all(tables.read_table(path).gated == (tables.GATED in path.name) for path in SHIPPED)
    (tmp_path / "sm_90.gated.json").write_text((tables.TABLES / "sm_90.gated.json").read_text())
    monkeypatch.setenv("SCALEVIT_TUNING", str(tmp_path))
    assert tables.table_path("sm_90", gated=True).parent == tmp_path
    assert tables.table_path("sm_90").parent == tables.TABLES
