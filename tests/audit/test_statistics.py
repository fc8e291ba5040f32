"""Intervals and censored medians, against hand calculations and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from specdef.audit.statistics import Censored, mean_interval, median_time


@pytest.mark.parametrize("n", [2, 3, 5, 20, 30])
def test_the_interval_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n).tolist()
    mean, low, high = mean_interval(values)
    expected = stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=stats.sem(values))
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx(expected, abs=0.06 * (expected[1] - expected[0]))
    if n <= 20:
        assert (low, high) == pytest.approx(expected, abs=1e-3)


def test_one_value_has_no_interval() -> None:
    mean, low, high = mean_interval([3.0])
    assert mean == 3.0 and math.isnan(low) and math.isnan(high)


def times(*values: float) -> list[Censored]:
    """Negative values are bounds."""
    return [Censored(value=abs(v), censored=v < 0) for v in values]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((2, 4, 9), "4"),
        ((2, 4), "2"),
        ((2, -8, -8), ">= 8"),
        ((-8, -8, -8), ">= 8"),
        ((2, 3, -8), "3"),
        ((-1, 2, 4), "2"),  # the bound left early: S(2) = 1/2
        ((4, -4), "4"),  # an arrival at t comes before a bound at t
        ((-3,), ">= 3"),
        ((3,), "3"),
    ],
)
def test_medians_of_censored_times(values: tuple[float, ...], expected: str) -> None:
    assert str(median_time(times(*values))) == expected


def test_it_is_scipys_kaplan_meier_estimate() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        arrival, end = generator.exponential(2, 9), generator.exponential(4, 9)
        seen = np.minimum(arrival, end)
        late = arrival > end
        survival = stats.ecdf(stats.CensoredData(uncensored=seen[~late], right=seen[late])).sf
        under = survival.quantiles[survival.probabilities <= 0.5 + 1e-9]
        found = median_time([Censored(value=float(s), censored=bool(c)) for s, c in zip(seen, late, strict=True)])  # fmt: skip
        assert found.censored == (len(under) == 0)
        assert found.value == pytest.approx(under[0] if len(under) else seen.max())
