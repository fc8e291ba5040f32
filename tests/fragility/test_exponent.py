"""The exponent on synthetic curves: the window a rule chooses, and how often the interval covers the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from specdef.fragility.exponent import fit_exponent
from specdef.fragility.steps import crossing, step_grid

STEPS = step_grid(400)


@pytest.mark.parametrize("k", [1.0, 2.0, 4.0])
def test_a_power_law_is_found_exactly(k):
    fit = fit_exponent(STEPS, [3e-9 * n**k for n in STEPS])
    assert fit.is_power_law and fit.value == pytest.approx(k, abs=1e-9)
    assert fit.window == (2, 400) and fit.low <= k + 1e-9 and fit.high >= k - 1e-9


def test_descent_in_steps_is_four_on_its_own_clock():
    """gamma^2 (n (n - 1))^2 / 8: 4 on the second clock, which fits it better than n does."""
    fit = fit_exponent(STEPS, [(n * (n - 1)) ** 2 * 1e-9 for n in STEPS])
    assert fit.value == pytest.approx(4, abs=1e-9) and fit.window[0] == 2


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        noise = np.exp(0.02 * rng.standard_normal(len(STEPS)))
        fit = fit_exponent(STEPS, [1e-9 * n**3 * e for n, e in zip(STEPS, noise, strict=True)])
        assert fit.is_power_law
        hits += fit.low <= 3 <= fit.high
    # 95 %, less what the choice between two clocks costs.
    assert 0.89 < hits / 400 < 0.99


def test_what_lies_below_the_floor_is_left_out():
    curve = [1e-9 * n**4 + 1e-6 * (1.5 + math.sin(9 * n)) for n in STEPS]
    kept = fit_exponent(STEPS, curve, floor=2e-5)
    assert kept.is_power_law and kept.value == pytest.approx(4, abs=0.05) and kept.window[0] >= 12
    assert (
        fit_exponent(STEPS, curve, floor=1.0) is not None
        and fit_exponent(STEPS, curve, floor=1e9) is None
    )


def test_a_saturating_curve_gives_the_window_before_it():
    curve = [min(1e-8 * n**4, 1.0) for n in STEPS]
    fit = fit_exponent(STEPS, curve)
    assert fit.is_power_law and fit.value == pytest.approx(4, abs=0.15) and fit.window[1] <= 130
    assert fit_exponent(STEPS, curve, ceiling=0.99).value == pytest.approx(4, abs=1e-9)


def test_what_is_no_power_law_is_called_none():
    fit = fit_exponent(STEPS, [math.exp(3 * math.sin(2 * math.log(n))) for n in STEPS])
    assert not fit.is_power_law and fit.rms > 0.05


def test_limits_and_gaps():
    curve = [1e-9 * n**2 for n in STEPS]
    assert fit_exponent(STEPS, curve, last_step=50).window[1] <= 50
    assert fit_exponent(STEPS[:3], curve[:3]) is None
    gap = [a if n < 12 or n > 40 else math.nan for n, a in zip(STEPS, curve, strict=True)]
    assert fit_exponent(STEPS, gap).window == (43, 400) or fit_exponent(STEPS, gap).window[0] > 40


def test_the_forecast_is_fitted_on_the_same_window():
    fit = fit_exponent(STEPS, [n**4 for n in STEPS], forecast=[n**3.5 for n in STEPS])
    assert fit.predicted == pytest.approx(3.5, abs=0.01)
    assert fit_exponent(STEPS, [n**4 for n in STEPS], forecast=[0.0] * len(STEPS)).predicted is None


@pytest.mark.parametrize("steps", [2, 3, 10, 40, 1000, 10**6])
def test_the_grid(steps):
    grid = step_grid(steps)
    assert grid[0] == 1 and grid[-1] == steps and len(grid) <= 24 and grid == sorted(set(grid))


def test_crossing():
    import torch

    curve = torch.tensor([1.0, 4.0, 16.0])
    assert crossing([1, 2, 4], curve, 8.0) == pytest.approx(2 * 2**0.5)
    assert crossing([1, 2, 4], curve, 0.5) == 1.0 and crossing([1, 2, 4], curve, 20.0) is None
    assert crossing([1, 2], torch.tensor([0.0, 1.0]), 0.5) == 2.0
