"""Intervals and censored medians, against hand calculations and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from specdef.audit.statistics import Censored, mean_interval, median_time, ratio_interval


@pytest.mark.parametrize("n", [2, 3, 5, 20, 30])
def test_the_interval_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n).tolist()
    mean, low, high = mean_interval(values)
    expected = stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=stats.sem(values))
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx(expected, rel=1e-9)


def test_one_value_has_no_interval_nor_has_one_that_is_not_finite() -> None:
    mean, low, high = mean_interval([3.0])
    assert mean == 3.0 and math.isnan(low) and math.isnan(high)
    mean, low, high = mean_interval([3.0, math.inf])
    assert mean == math.inf and math.isnan(low) and math.isnan(high)


def test_a_ratio_is_covered_as_often_as_its_interval_says() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        bottoms = 1 + 0.2 * generator.normal(size=5)
        tops = 0.4 * bottoms + 0.05 * generator.normal(size=5)
        ratio, low, high = ratio_interval(tops.tolist(), bottoms.tolist())
        assert ratio == pytest.approx(tops.mean() / bottoms.mean())
        inside += low <= 0.4 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_equal_denominators_give_students_interval_of_the_shares() -> None:
    assert ratio_interval([1.0, 2.0, 4.0], [2.0] * 3) == pytest.approx(mean_interval([0.5, 1.0, 2.0]))  # fmt: skip


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
