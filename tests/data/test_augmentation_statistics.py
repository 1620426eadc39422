"""A small sample of docs/results/augmentation_statistics.json, and that the file says that everything agrees."""

import json
from pathlib import Path

import pytest
from augmentation_statistics import BEFORE, FAST, OWN, TIMM, agrees, compared, measure

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "augmentation_statistics.json"
NAMES = ["erased", "erased area", "pixel mean", "pixel variance", "operations", "flipped", "crop area", "crop ratio"]


@pytest.fixture(scope="module")
def rows():
    return compared(measure(600))


def test_a_small_sample_is_distributed_as_timms(rows):
    found = {(row["of"], row["statistic"]): row for row in rows}
    for name in NAMES:
        for path in (OWN, FAST):
            assert found[path, name]["agrees"], found[path, name]
    for name in ("erased, mixed", "erased area, mixed"):
        assert found[OWN, name]["agrees"], found[OWN, name]


def test_erased_before_mixing_more_images_have_a_rectangle(rows):
    """1 - 0.75 ** 2 of them, but for rectangles that CutMix cuts away."""
    row = next(row for row in rows if row["of"] == BEFORE and row["statistic"] == "erased, mixed")
    assert not row["agrees"]
    assert 0.3 < row["mean"] < 0.4375 + 4 * (0.25 / 600) ** 0.5


def test_the_whole_measurement_agrees():
    record = json.loads(RESULTS.read_text())
    found = {(row["of"], row["statistic"]): row for row in record["statistics"]}
    for (of, name), row in found.items():
        assert row["agrees"] == agrees(row["z"], row["p"])
        assert row["agrees"] == (of != BEFORE), (of, name)
    assert {name for of, name in found if of == FAST} == set(NAMES)
    assert {name for of, name in found if of == TIMM} == {*NAMES, "erased, mixed", "erased area, mixed"}
