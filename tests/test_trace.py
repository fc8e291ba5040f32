"""Trace and Frobenius norm: equal to naive transcriptions, exact where they must be, within their standard errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planted import planted, uniform
from specdef.curvature.linear import MatrixOperator
from specdef.curvature.trace import frobenius_norm_squared, trace
from specdef.errors import SpecDefError


def signs(n: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, (n,), generator=generator) for _ in range(count)]
    return 2 * torch.stack(rows).double() - 1


def decaying(n: int = 200) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) ** -2


@pytest.mark.parametrize("probes", [2, 7, 30])
def test_hutchinson_equals_its_formula(probes: int) -> None:
    A = planted(uniform(50, -1, 2))
    operator = MatrixOperator(A)
    V = signs(50, probes, 4)
    samples = ((V @ A) * V).sum(1)
    found = trace(operator, probes, seed=4)
    assert found.value == pytest.approx(float(samples.mean()), rel=1e-12)
    assert found.standard_error == pytest.approx(float(samples.std()) / probes**0.5, rel=1e-10)
    assert found.num_matvecs == operator.num_matvecs == probes
    squares = ((V @ A) ** 2).sum(1)
    norm = frobenius_norm_squared(operator, probes, seed=4)
    assert norm.value == pytest.approx(float(squares.mean()), rel=1e-12)
    assert norm.standard_error == pytest.approx(float(squares.std()) / probes**0.5, rel=1e-10)


@pytest.mark.parametrize("probes", [3, 9, 10, 11, 30])
def test_hutch_plus_plus_equals_a_naive_transcription(probes: int) -> None:
    A = planted(decaying(60))
    operator = MatrixOperator(A)
    third = probes // 3
    V = signs(60, probes - third, 2).T
    S, G = V[:, :third], V[:, third:]
    Q = torch.linalg.qr(A @ S)[0]
    P = torch.eye(60, dtype=torch.float64) - Q @ Q.T
    samples = (G * (P @ A @ P @ G)).sum(0)
    found = trace(operator, probes, method="hutch++", seed=2)
    assert found.value == pytest.approx(float(torch.trace(Q.T @ A @ Q) + samples.mean()), rel=1e-10)
    assert found.num_matvecs == operator.num_matvecs == probes
    if len(samples) > 1:
        error = float(samples.std()) / len(samples) ** 0.5
        assert found.standard_error == pytest.approx(error, rel=1e-8)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
@pytest.mark.parametrize("values", [decaying(), uniform(200, -1, 2)], ids=["decaying", "flat"])
def test_within_standard_errors(method: str, values: Tensor) -> None:
    operator = MatrixOperator(planted(values))
    exact = float(values.sum())
    scores, estimates = [], []
    for seed in range(40):
        found = trace(operator, 30, method=method, seed=seed)  # type: ignore[arg-type]
        scores.append((found.value - exact) / found.standard_error)
        estimates.append(found.value)
    # 95 % of a normal variable is within 2; few samples of skewed ones have heavier tails.
    within = sum(abs(score) <= 2 for score in scores)
    assert within >= 32 and float(torch.tensor(scores).std()) > 0.6
    # Free of bias.
    mean = torch.tensor(estimates, dtype=torch.float64)
    assert abs(float(mean.mean()) - exact) <= 3.5 * float(mean.std()) / 40**0.5


def test_hutch_plus_plus_gains_where_few_eigenvalues_carry_the_norm() -> None:
    operator = MatrixOperator(planted(decaying()))
    plain = trace(operator, 30).standard_error
    assert trace(operator, 30, method="hutch++").standard_error < plain / 10


def test_variance_is_the_one_stated() -> None:
    A = planted(uniform(100, -1, 2))
    estimates = [trace(MatrixOperator(A), 1, seed=seed).value for seed in range(400)]
    stated = 2 * float((A**2).sum() - (A.diagonal() ** 2).sum())
    assert float(torch.tensor(estimates).var()) == pytest.approx(stated, rel=0.25)


def test_frobenius_within_standard_errors() -> None:
    values = uniform(150, -1, 2)
    operator = MatrixOperator(planted(values))
    for seed in range(10):
        found = frobenius_norm_squared(operator, 30, seed=seed)
        assert abs(found.value - float((values**2).sum())) <= 4 * found.standard_error


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 12), seed=st.integers(0, 10**6), rank=st.integers(0, 3))
def test_hutch_plus_plus_is_exact_for_low_rank(n: int, seed: int, rank: int) -> None:
    values = uniform(n, -1, 1, seed)
    values[min(rank, n) :] = 0
    found = trace(MatrixOperator(planted(values, seed)), 12, method="hutch++", seed=seed)
    assert found.value == pytest.approx(float(values.sum()), abs=1e-6)
    assert found.standard_error == pytest.approx(0, abs=1e-6)


def test_diagonal_matrix_has_no_error() -> None:
    found = trace(MatrixOperator(torch.diag(torch.tensor([1.0, -4.0, 2.5]))), 3)
    assert (found.value, found.standard_error) == (-0.5, 0.0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_magnitudes_in_float32(scale: float) -> None:
    values = uniform(40, 1, 2)
    operator = MatrixOperator((planted(values) * scale).float())
    found = frobenius_norm_squared(operator, 20)
    assert found.value / scale**2 == pytest.approx(float((values**2).sum()), rel=0.2)
    assert trace(operator, 20).value / scale == pytest.approx(float(values.sum()), rel=0.2)


def test_single_probe_has_no_standard_error() -> None:
    operator = MatrixOperator(planted(uniform(9, -1, 1)))
    assert math.isnan(trace(operator, 1).standard_error)
    assert math.isnan(trace(operator, 3, method="hutch++").standard_error)
    assert math.isnan(frobenius_norm_squared(operator, 1).standard_error)


def test_deterministic_by_seed_and_argument_mistakes() -> None:
    operator = MatrixOperator(planted(uniform(9, -1, 1)))
    first = trace(operator, 5, seed=1)
    torch.manual_seed(0)
    assert trace(operator, 5, seed=1) == first != trace(operator, 5, seed=2)
    with pytest.raises(ValueError, match=r"num_probes must be at least 1, got 0\."):
        trace(operator, 0)
    with pytest.raises(ValueError, match=r"num_probes must be at least 3, got 2\."):
        trace(operator, 2, method="hutch++")
    with pytest.raises(ValueError, match=r"num_probes must be at least 1, got 0\."):
        frobenius_norm_squared(operator, 0)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_not_finite(method: str) -> None:
    operator = MatrixOperator(torch.full((4, 4), math.inf))
    with pytest.raises(SpecDefError, match="NaN or infinite"):
        trace(operator, 3, method=method)  # type: ignore[arg-type]
