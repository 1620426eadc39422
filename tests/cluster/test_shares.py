"""Cores and GPUs divided among processes."""

import pytest

from scalevit.cluster.shares import Share, divide, visible_gpus
from scalevit.errors import UserError


@pytest.mark.parametrize(
    ("count", "cores", "gpus", "expected"),
    [
        (1, [0, 1], [], [Share((0, 1), None)]),
        (2, [0, 1, 4], [], [Share((0, 1), None), Share((4,), None)]),
        (2, [0, 1], ["0", "1", "2"], [Share((0,), ("0", "1")), Share((1,), ("2",))]),
        (3, [0, 1, 2], ["5", "6"], [Share((0,), ("5",)), Share((1,), ("6",)), Share((2,), ("5",))]),
    ],
)
def test_shares(count: int, cores: list[int], gpus: list[str], expected: list[Share]) -> None:
    assert divide(count, cores, gpus) == expected


def test_more_runs_than_cores_are_refused() -> None:
    with pytest.raises(UserError, match="--parallel 3: there are only 2 cores"):
        divide(3, [0, 1], [])


@pytest.mark.parametrize(
    ("value", "expected"), [("0,2", ["0", "2"]), ("GPU-ab, MIG-cd", ["GPU-ab", "MIG-cd"]), ("", []), ("-1", [])]
)
def test_visible_gpus(value: str, expected: list[str]) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": value}) == expected


def test_the_environment_of_a_share() -> None:
    assert Share((0,), ("3", "4")).environment() == {"CUDA_VISIBLE_DEVICES": "3,4"}
    assert Share((0,), None).environment() == {}
