"""Planted truth: every estimate against its closed form, the exponents 4 and 2, and the band around the run."""

from __future__ import annotations

import math

import pytest
import torch

from .toys import regression

RATE, STEPS = 1e-3, 60


@pytest.fixture(scope="module")
def orthogonal():
    toy = regression()
    return toy, toy.diagnose(RATE, STEPS, observe=True)


def close(value: float, truth: float, tolerance: float = 1e-6) -> bool:
    return abs(value - truth) <= tolerance * abs(truth)


def test_subspace_and_coupling(orthogonal):
    toy, report = orthogonal
    assert report.rank == 3
    assert torch.allclose(report.subspace.values, toy.values, rtol=1e-6)
    assert close(report.lambda_min, 2.0)
    assert close(report.subspace.trace, float(toy.values.sum())) and close(
        report.subspace.energy, 1.0
    )
    U = report.subspace.vectors
    assert torch.allclose(U.T @ U, toy.U.T @ toy.U, atol=1e-6)
    gamma = math.sqrt(float(toy.values @ (toy.U @ (toy.H @ toy.g)) ** 2))
    assert close(report.gamma, gamma)
    assert close(report.gradient_norm, float(toy.g.norm()))
    assert report.initial_overlap < 1e-6
    assert close(report.overlap_random, math.sqrt(3 / 20))
    Hg = float((toy.H @ toy.g).norm())
    assert close(report.gamma_random, Hg * math.sqrt(float(toy.values.sum()) / 20))
    assert close(report.forecast.lambda_max, 1.0)


def test_forecast_is_the_dense_path(orthogonal):
    toy, report = orthogonal
    forecast = report.forecast
    dense = toy.alignment(toy.path(RATE, STEPS))[[n - 1 for n in forecast.steps]]
    # The first step does not leave the subspace's complement: there is nothing but rounding.
    assert forecast.steps[0] == 1 and float(dense[0]) < 1e-28 > forecast.alignment[0]
    assert torch.allclose(torch.tensor(forecast.alignment[1:]).double(), dense[1:], rtol=1e-6)
    assert torch.allclose(torch.tensor(forecast.in_subspace[1:]).double(), dense[1:], rtol=1e-6)
    gamma = report.gamma
    t4 = [(RATE**2 * n * (n - 1)) ** 2 for n in forecast.steps]
    assert all(
        close(q, gamma**2 * t / 8) for q, t in zip(forecast.quartic[1:], t4[1:], strict=True)
    )
    # The law leaves out the third order: nothing at the second step, and more and more from there.
    off = [x / y - 1 for x, y in zip(forecast.taylor[1:], forecast.alignment[1:], strict=True)]
    assert (
        off[0] < 1e-6
        and off[-1] < 0.08
        and off[10] / off[-1] == pytest.approx(forecast.steps[11] / STEPS, rel=0.3)
    )
    assert close(forecast.model_error.alignment_ratio, 1.0) and forecast.model_error.path < 1e-6
    assert forecast.applicable and not forecast.reasons


def test_the_exponent_is_four(orthogonal):
    _, report = orthogonal
    assert report.exponent.is_power_law and report.exponent.window[1] == STEPS
    assert abs(report.exponent.value - 4) < 0.1
    assert report.exponent.low <= report.exponent.value <= report.exponent.high
    assert abs(report.exponent.predicted - report.exponent.value) < 1e-3
    assert report.forecast.regime == "quartic" and abs(report.forecast.exponent - 4) < 0.1
    assert report.forecast.onset_steps < 1e-3


def test_the_run_is_in_the_band(orthogonal):
    _, report = orthogonal
    observed, forecast = report.observed, report.forecast
    assert observed.status == "completed" and observed.steps == forecast.steps
    assert observed.band_coverage == 1.0 and observed.error_factor < 1e-6
    assert all(h <= 1.1 * p for p, h in zip(forecast.alignment[1:], forecast.high[1:], strict=True))
    assert observed.in_subspace[-1] == pytest.approx(observed.alignment[-1], rel=1e-6)
    assert observed.task_loss[-1] < observed.task_loss[0]


def test_conditions_hold(orthogonal):
    _, report = orthogonal
    assert [c.name for c in report.conditions] == ["low-rank sensitivity", "initial orthogonality", "curvature coupling"]  # fmt: skip
    low_rank, start, coupling = report.conditions
    assert low_rank.holds and start.holds and low_rank.margin > 1 and start.margin > 1
    assert coupling.holds == (coupling.value > coupling.threshold) == (coupling.margin > 1)


def test_the_exponent_is_two_where_the_gradient_overlaps():
    report = regression(overlap=0.7).diagnose(RATE, STEPS, observe=True)
    assert report.initial_overlap == pytest.approx(0.7, rel=1e-6)
    assert report.exponent.is_power_law and abs(report.exponent.value - 2) < 0.1
    assert report.forecast.regime == "quadratic"
    assert not report.conditions[1].holds
    assert report.observed.band_coverage == 1.0


def test_onset_is_where_the_terms_are_equal():
    toy = regression(overlap=0.005)
    report = toy.diagnose(RATE, 400)
    Pg, PHg = toy.U @ toy.g, toy.U @ (toy.H @ toy.g)
    a, gamma = float(toy.values @ Pg**2), math.sqrt(float(toy.values @ PHg**2))
    onset = 2 * math.sqrt(a) / gamma / RATE
    assert report.forecast.onset_steps == pytest.approx(onset, rel=1e-6)
    assert 5 < onset < 400


@pytest.mark.parametrize("optimizer", ["gd", "heavy_ball", "nesterov"])
def test_every_method_with_constant_coefficients_is_followed(optimizer):
    report = regression(overlap=0.1).diagnose(1e-2, 50, optimizer=optimizer, observe=True)
    assert report.observed.error_factor < 1e-6 and report.observed.band_coverage == 1.0


def test_time_to_threshold_is_when_the_run_gets_there():
    toy = regression(scale=3.0)
    threshold = float(toy.alignment(toy.path(1e-2, 150))[99])
    report = toy.diagnose(1e-2, 50, threshold=threshold)
    found = report.forecast.time_to_threshold
    assert found.steps == pytest.approx(100, rel=0.01) and found.low <= found.steps <= found.high
    assert toy.diagnose(1e-2, 50, threshold=1e9).forecast.time_to_threshold.steps is None


def test_a_short_krylov_space_is_in_the_band():
    """What the path misses with few Lanczos steps is part of the error that the report states."""
    toy = regression(n=40, overlap=0.05)
    report = toy.diagnose(0.5, 40, krylov_steps=4, observe=True)
    assert report.forecast.model_error.krylov > 0
    assert report.observed.band_coverage == 1.0


def test_a_known_subspace_gives_the_same_report(orthogonal):
    toy, report = orthogonal
    again = toy.diagnose(RATE, STEPS, subspace=report.subspace)
    assert again.gamma == report.gamma and again.forecast == report.forecast
    assert again.cost["fisher_products"] < report.cost["fisher_products"]


def test_a_subspace_of_something_else_is_refused(orthogonal):
    toy, report = orthogonal
    with pytest.raises(ValueError, match="other parameters"):
        regression(12).diagnose(RATE, STEPS, subspace=report.subspace)
    with pytest.raises(ValueError, match="empirical matrix"):
        toy.diagnose(RATE, STEPS, subspace=report.subspace, fisher="empirical")
