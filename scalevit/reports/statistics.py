"""Means over seeds, paired t-tests, and Holm's correction. Knows numbers only.

Sources: Student, "The probable error of a mean", Biometrika 6 (1908); Holm, "A simple sequentially rejective multiple
test procedure", Scandinavian Journal of Statistics 6 (1979).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A mean over seeds."""

    mean: float
    std: float | None
    """Of the sample (n - 1); None for one value."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        mean = math.fsum(values) / len(values)
        return cls(mean, _std(values, mean), len(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


def spread_of(values: Sequence[float | None]) -> Spread | None:
    """None if there is no value, or one of them is missing."""
    known = [value for value in values if value is not None]
    return Spread.of(known) if known and len(known) == len(values) else None


def _std(values: Sequence[float], mean: float) -> float | None:
    if len(values) < 2:
        return None
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


@dataclass(frozen=True)
class PairedTest:
    """A two-sided paired t-test. What cannot be computed is None, and `reason` says why."""

    n: int
    """Pairs."""
    mean: float | None
    """Of the differences."""
    df: int | None = None
    t: float | None = None
    p: float | None = None
    p_holm: float | None = None
    """Corrected for the number of tests in its family."""
    low: float | None = None
    high: float | None = None
    """Ends of the confidence interval of the mean difference."""
    reason: str | None = None


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Tests whether the mean of paired differences is zero.

    Args:
        differences: one for each pair; they are taken to be independent and normally distributed.
    """
    from scipy.special import stdtr, stdtrit  # takes 0.3 s

    n = len(differences)
    if n == 0:
        return PairedTest(n, None, reason="no seed is finished in both groups")
    spread = Spread.of(differences)
    if spread.std is None:
        return PairedTest(n, spread.mean, reason="too few seeds: one pair has no spread")
    df = n - 1
    # Equal differences of decimal numbers differ in the last bits; their t would be of rounding errors.
    rounding = 1e-12 * max(map(abs, differences))
    if spread.std <= rounding:
        return PairedTest(n, spread.mean, df, reason="all differences are equal: there is no spread to test against")
    error = spread.std / math.sqrt(n)
    t = spread.mean / error
    reach = float(stdtrit(df, (1 + CONFIDENCE) / 2)) * error
    return PairedTest(
        n,
        spread.mean,
        df,
        t,
        p=2 * float(stdtr(df, -abs(t))),
        low=spread.mean - reach,
        high=spread.mean + reach,
        reason="weak: few seeds" if n == 2 else None,
    )


def with_holm(tests: Sequence[PairedTest]) -> list[PairedTest]:
    """The tests of one family with their corrected p; those without a p do not count."""
    order = sorted((index for index, test in enumerate(tests) if test.p is not None), key=lambda i: tests[i].p or 0.0)
    corrected, highest = list(tests), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * (tests[index].p or 0.0)))
        corrected[index] = replace(tests[index], p_holm=highest)
    return corrected
