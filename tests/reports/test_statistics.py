"""Means, paired t-tests and Holm's correction, against SciPy and a reference by definition."""

import numpy as np
import pytest
from scipy import stats

from scalevit.reports.statistics import PairedTest, Spread, paired_test, with_holm


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_paired_test_is_scipys(n: int) -> None:
    random = np.random.default_rng(n)
    a, b = random.normal(70, 2, n), random.normal(71, 2, n)
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    found = paired_test(list(a - b))
    assert (found.n, found.df) == (n, expected.df)
    # Both are computed in double precision, by different sums.
    assert [found.t, found.p, found.low, found.high] == pytest.approx(
        [expected.statistic, expected.pvalue, interval.low, interval.high], rel=1e-9
    )
    assert found.mean == pytest.approx(np.mean(a - b), rel=1e-12)
    assert (found.reason == "weak: few seeds") == (n == 2)


def test_what_cannot_be_tested_says_why() -> None:
    assert paired_test([]) == PairedTest(0, None, reason="no seed is finished in both groups")
    one = paired_test([0.5])
    assert (one.n, one.mean, one.df, one.t, one.p) == (1, 0.5, None, None, None)
    assert one.reason.startswith("too few seeds")
    # 0.1 apart, each with its own rounding.
    equal = paired_test([97.3 - 97.2, 88.4 - 88.3, 0.3 - 0.2])
    assert (equal.n, equal.df, equal.t, equal.p) == (3, 2, None, None)
    assert equal.mean == pytest.approx(0.1)
    assert "all differences are equal" in equal.reason
    assert paired_test([0.0, 0.0]).p is None


def test_a_spread_is_of_the_sample() -> None:
    values = [70.1, 71.3, 69.8, 70.9]
    spread = Spread.of(values)
    assert (spread.mean, spread.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)), rel=1e-12)
    assert Spread.of([3.0]) == Spread(3.0, None, 1)


@pytest.mark.parametrize(
    "values", [[0.01, 0.04, 0.03, 0.005], [0.5, 0.5, 0.9], [0.02, 0.02], [0.3], [1e-9, 0.04, 0.049, 0.2, 1.0], []]
)
def test_holm_is_its_definition(values: list[float]) -> None:
    """The largest, over all p up to this one, of p times the number of p that are not smaller; at most 1."""
    ordered = sorted(values)
    expected = [
        max(min(1.0, (len(ordered) - rank) * p) for rank, p in enumerate(ordered) if p <= value) for value in values
    ]
    found = with_holm([PairedTest(5, 0.0, p=value) for value in values])
    assert [test.p_holm for test in found] == pytest.approx(expected, rel=1e-12)


def test_tests_without_a_p_do_not_count_for_holm() -> None:
    found = with_holm([PairedTest(1, 0.3), PairedTest(5, 0.1, p=0.02), PairedTest(5, 0.1, p=0.03)])
    assert [test.p_holm for test in found] == [None, 0.04, 0.04]
