"""The engines' `cost` and the planner's activations against what real ranks hold and send."""

from typing import Any

import pytest

import accounting


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return accounting.measure(tmp_path_factory.mktemp("accounting"))


def name(row: dict[str, Any]) -> str:
    return f"{row['ranks']} x {row['engine']}, {row['reduction']}, accumulation {row['accumulation']}"


def test_a_rank_holds_what_was_estimated(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        measured, estimated = row["measured"]["held"], row["estimated"]["held"]
        # Of all tensors: flat partitions are padded, AdamW counts steps, and ZeRO keeps a whole gradient where its
        # partition has a part of it, which weighs in a model of 16 layers.
        tolerance = {"gradients": 0.01, "all": 0.005}
        for purpose, size in estimated.items():
            assert measured[purpose] == pytest.approx(size, rel=tolerance.get(purpose, 0.001)), (name(row), purpose)


def test_a_step_never_needs_more_than_was_estimated(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        measured, estimated = row["measured"]["step_peak"], row["estimated"]["step_peak"]
        assert measured <= estimated, name(row)
        # From above: all parts are added up at their largest, but gradients grow as activations shrink.
        assert estimated <= 1.4 * measured, name(row)


def test_a_rank_sends_what_was_estimated(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        measured, estimated = row["measured"]["sent"], row["estimated"]["sent"]
        for kind in ("all_reduce", "reduce_scatter", "all_gather"):
            if row["ranks"] == 1 and measured.get(kind, 0) == 0:
                continue  # not called where there is nobody to talk to
            # Norms and overflow flags are a few numbers; partitions are padded.
            assert measured.get(kind, 0) == pytest.approx(estimated[kind], rel=0.001, abs=200), (name(row), kind)
        assert set(measured) <= {"all_reduce", "reduce_scatter", "all_gather"}, name(row)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp"])
def test_grouped_sends_less_by_its_share_of_parameters(rows: list[dict[str, Any]], engine: str) -> None:
    none, grouped = (
        next(r for r in rows if (r["ranks"], r["engine"], r["reduction"], r["accumulation"]) == (2, engine, kind, 1))
        for kind in ("none", "grouped")
    )
    share = grouped["parameters"] / none["parameters"]

    def ratio(kind: str) -> float:
        return grouped["measured"]["sent"][kind] / none["measured"]["sent"][kind]

    assert ratio("reduce_scatter" if engine in ("zero3", "fsdp") else "all_reduce") == pytest.approx(share, rel=0.01)
    if engine == "fsdp":
        # Shared MLPs stay gathered from the forward to the backward, so even less is gathered.
        assert ratio("all_gather") < share
    else:
        assert ratio("all_gather") == pytest.approx(share, rel=0.01)
