"""Stochastic Lanczos quadrature against exact spectra: within its standard errors, with and without deflation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planted import gaussian, planted, uniform
from specdef.curvature.density import SpectralDensity, signed_exp, signed_log, spectral_density
from specdef.curvature.eigenvalues import top_eigenvalues
from specdef.curvature.lanczos import LanczosRun, lanczos
from specdef.curvature.linear import DeflatedOperator, MatrixOperator
from specdef.errors import SpecDefError

QUANTILES = [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]


def drowned(n: int = 400) -> Tensor:
    """Return five outliers and a bulk 1e-8 of them."""
    values = 1e-8 * (1 + 0.3 * gaussian(n))
    values[:5] = torch.tensor([1, 0.8, 0.5, 0.3, 0.2])
    return values


def quantile_errors(density: SpectralDensity, values: Tensor) -> float:
    exact = values.sort()[0]
    found = torch.tensor([density.quantile(q) for q in QUANTILES], dtype=torch.float64)
    true = torch.stack([exact[int(q * len(exact))] for q in QUANTILES])
    return float(((found - true) / true).abs().max())


def smoothed(values: Tensor, grid: Tensor, sigma: float) -> Tensor:
    """Return the exact histogram, every eigenvalue a Gaussian."""
    z = (grid[:, None] - values) / sigma
    return (torch.exp(-(z**2) / 2) / (sigma * math.sqrt(2 * math.pi))).mean(1)


def equal(a: SpectralDensity, b: SpectralDensity, tolerance: float = 0.0) -> bool:
    pairs = zip((*a.nodes, *a.weights), (*b.nodes, *b.weights), strict=True)
    return all(len(x) == len(y) and float((x - y).abs().max()) <= tolerance for x, y in pairs)


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("deflated", [0, 4])
def test_within_standard_errors(reorthogonalize: bool, deflated: int) -> None:
    values = torch.cat([torch.tensor([9.0, -7.0, 6.0, 5.0]), gaussian(396, 1)]).double()
    operator = MatrixOperator(planted(values))
    found = top_eigenvalues(operator, deflated, tol=1e-8) if deflated else None
    before = operator.num_matvecs
    density = spectral_density(
        operator, 20, 80, seed=3, deflate=found, reorthogonalize=reorthogonalize
    )
    assert density.num_matvecs == operator.num_matvecs - before == 20 * 80
    for power in (1, 2, 3):
        value, error = density.moment(power)
        assert error > 0 and abs(value - float((values**power).mean())) <= 3.5 * error
    grid = torch.linspace(-8, 10, 181, dtype=torch.float64)
    curve = density.cumulative(grid)
    true = (values <= grid[:, None]).double().mean(1)
    # Besides chance, one rule knows the fraction to the weight of a node.
    assert bool(((curve.value - true).abs() <= 3.5 * curve.standard_error + 1 / 80).all())
    smooth = density.density(grid, sigma=0.5)
    error = (smooth.value - smoothed(values, grid, 0.5)).abs()
    assert bool((error <= 3.5 * smooth.standard_error + 1e-3).all())
    assert float(smooth.standard_error.max()) < 0.03 * float(smooth.value.max())


def test_standard_errors_are_neither_too_small_nor_too_large() -> None:
    values = uniform(150, -1, 2)
    operator = MatrixOperator(planted(values))
    scores = []
    for seed in range(60):
        value, error = spectral_density(operator, 8, 3, seed=seed).moment(1)
        scores.append((value - float(values.mean())) / error)
    spread = float(torch.tensor(scores).std())
    assert 0.7 < spread < 1.6  # Student's t with 7 degrees of freedom has 1.18


def test_moments_are_exact_for_the_probes() -> None:
    values = uniform(60, -1, 1)
    A = planted(values)
    density = spectral_density(MatrixOperator(A), 3, 4, seed=5)
    generator = torch.Generator().manual_seed(5)
    probes = [torch.randn(60, generator=generator, dtype=torch.float64) for _ in range(3)]
    for power in range(8):
        M = torch.linalg.matrix_power(A, power)
        samples = torch.stack([(v @ M @ v) / (v @ v) for v in probes])
        value, error = density.moment(power)
        assert value == pytest.approx(float(samples.mean()), abs=1e-12)
        assert error == pytest.approx(float(samples.std()) / 3**0.5, abs=1e-12)


@pytest.mark.parametrize("tol", [1e-3, 1e-10])
def test_deflation_shows_a_bulk_1e_8_of_the_top(tol: float) -> None:
    values = drowned()
    operator = MatrixOperator(planted(values))
    found = top_eigenvalues(operator, 5, tol=tol)
    density = spectral_density(operator, 10, 60, deflate=found)
    assert quantile_errors(density, values) <= 0.05
    points = density.deflated.sort()[0]
    assert points.tolist() == pytest.approx([0.2, 0.3, 0.5, 0.8, 1.0], rel=1e-6)
    assert all(float(nodes.abs().max()) <= 3e-8 for nodes in density.nodes)
    grid = torch.tensor([0.1, 0.25, 0.6, 2.0])
    steps = 1 - torch.tensor([5, 4, 2, 0]).double() / 400
    assert density.cumulative(grid).value.tolist() == pytest.approx(steps.tolist(), abs=1e-12)
    # Without, the mean is at the mercy of how much of the outliers a probe happens to hold.
    plain = spectral_density(operator, 10, 60)
    mean = float(values.mean())
    assert abs(density.moment(1)[0] / mean - 1) < 1e-6 and density.moment(1)[1] < 1e-6 * mean
    assert plain.moment(1)[1] > 0.1 * mean


def test_without_deflation_in_float32_the_bulk_drowns() -> None:
    values = drowned()
    operator = MatrixOperator(planted(values).float())
    density = spectral_density(operator, 10, 60)
    assert quantile_errors(density, values) > 0.5
    # It says so itself.
    assert density.floor > 30 * 1e-8
    assert spectral_density(MatrixOperator(planted(values)), 2, 20).floor < 1e-13


def test_loose_deflation_moves_the_distribution_by_k_over_n() -> None:
    index = torch.arange(1, 301, dtype=torch.float64)
    values = index**-0.5
    A = planted(values)
    found = top_eigenvalues(MatrixOperator(A), 6, tol=0.05, max_matvecs=8)
    assert float(found.residuals.max()) > 1e-3
    # The bulk exactly, so that nothing but the deflation differs.
    assert found.vectors is not None
    bulk = torch.linalg.eigvalsh(DeflatedOperator(MatrixOperator(A), found.vectors).to_dense())
    zeros = bulk.abs().argsort()[:6]
    keep = torch.ones(300, dtype=torch.bool)
    keep[zeros] = False
    both = torch.cat([bulk[keep], found.values])
    grid = torch.linspace(0, 1, 400, dtype=torch.float64)
    moved = ((both <= grid[:, None]).double() - (values <= grid[:, None]).double()).mean(1).abs()
    assert 0 < float(moved.max()) <= 6 / 300
    density = spectral_density(MatrixOperator(A), 10, 80, deflate=found)
    curve = density.cumulative(grid)
    true = (values <= grid[:, None]).double().mean(1)
    assert bool(((curve.value - true).abs() <= 3.5 * curve.standard_error + 1 / 80 + 0.02).all())


@pytest.mark.parametrize("max_basis", [None, 12])
def test_a_shared_run_is_the_first_probe(max_basis: int | None) -> None:
    values = uniform(300, -1, 1) ** 3
    operator = MatrixOperator(planted(values))
    found = top_eigenvalues(operator, 4, tol=1e-6, seed=9, keep_basis=True, max_basis=max_basis)
    steps = found.run.num_steps
    before = operator.num_matvecs
    shared = spectral_density(operator, 5, steps, seed=9, runs=[found.run])
    assert shared.num_matvecs == operator.num_matvecs - before == 4 * steps
    assert equal(shared, spectral_density(operator, 5, steps, seed=9), 1e-9)
    # One that has kept its basis is resumed to the length of the others.
    before = operator.num_matvecs
    longer = spectral_density(operator, 2, steps + 10, seed=9, runs=[found.run])
    assert longer.num_matvecs == operator.num_matvecs - before == 10 + steps + 10
    assert equal(longer, spectral_density(operator, 2, steps + 10, seed=9), 1e-9)
    without = replace(found.run, basis=None, tail=None)
    short = spectral_density(operator, 2, steps + 10, seed=9, runs=[without])
    assert [len(nodes) for nodes in short.nodes] == [steps, steps + 10]


def test_a_shared_run_with_deflation_is_lanczos_on_the_deflated_operator() -> None:
    values = drowned()
    operator = MatrixOperator(planted(values))
    found = top_eigenvalues(operator, 5, tol=1e-12, keep_basis=True)
    run = lanczos(operator, None, 40, resume=found.run)
    assert found.vectors is not None and run.basis is not None
    shared = spectral_density(operator, 1, 40, deflate=found, runs=[run])
    assert shared.num_matvecs == 0 and len(shared.nodes[0]) == 35
    fresh = spectral_density(operator, 1, 35, deflate=found)
    assert float((shared.nodes[0] - fresh.nodes[0]).abs().max()) <= 1e-3 * 1e-8
    assert float((shared.weights[0] - fresh.weights[0]).abs().max()) <= 1e-3
    assert quantile_errors(spectral_density(operator, 8, 40, deflate=found, runs=[run]), values) < (
        0.06
    )


def test_a_shared_run_must_know_what_is_deflated() -> None:
    operator = MatrixOperator(planted(drowned()))
    found = top_eigenvalues(operator, 5, tol=1e-12)
    assert found.vectors is not None
    blind = lanczos(operator, found.vectors[3] + found.vectors[4], 2, keep_basis=False)
    with pytest.raises(ValueError, match="no node for the deflated eigenvalue 1"):
        spectral_density(operator, 2, 20, deflate=found, runs=[blind])
    bare = replace(found, vectors=None)
    with pytest.raises(ValueError, match="must have its vectors"):
        spectral_density(operator, 2, 20, deflate=bare)
    small = MatrixOperator(torch.eye(3).double())
    with pytest.raises(ValueError, match="leave at least one"):
        spectral_density(small, 2, 2, deflate=top_eigenvalues(small, 3))


def test_log_density_integrates_to_one_and_shows_both_scales() -> None:
    values = drowned()
    values[5] = -0.4
    operator = MatrixOperator(planted(values))
    found = top_eigenvalues(operator, 6, tol=1e-10)
    density = spectral_density(operator, 10, 60, deflate=found)
    for sigma in (0.05, 0.1, 0.3):
        curve = density.log_density(sigma=sigma, threshold=1e-10)
        assert float(torch.trapezoid(curve.value, curve.position)) == pytest.approx(1, abs=1e-6)
    curve = density.log_density(threshold=1e-10)
    assert bool((curve.grid.diff() > 0).all())
    assert torch.allclose(signed_log(curve.grid, 1e-10), curve.position)
    bulk = (curve.grid > 1e-9) & (curve.grid < 1e-6)
    mass = float(torch.trapezoid(curve.value[bulk], curve.position[bulk]))
    assert mass == pytest.approx(394 / 400, abs=0.01)
    peak = float(curve.grid[curve.value.argmax()])
    assert 0.5e-8 < peak < 2e-8
    below = curve.grid < -0.01
    mass = float(torch.trapezoid(curve.value[below], curve.position[below]))
    assert mass == pytest.approx(1 / 400, rel=0.01)
    exact = smoothed(signed_log(values, 1e-10), curve.position, 0.1)
    assert float((curve.value - exact).abs().max()) <= 0.05 * float(exact.max())


def test_linear_density_integrates_to_one() -> None:
    density = spectral_density(MatrixOperator(planted(uniform(80, -1, 1))), 4, 20)
    curve = density.density()
    assert float(torch.trapezoid(curve.value, curve.grid)) == pytest.approx(1, abs=1e-6)
    assert torch.equal(curve.grid, curve.position)
    wide = density.density(torch.linspace(-3, 3, 500), sigma=0.3)
    assert wide.grid.dtype == torch.float64
    assert float(torch.trapezoid(wide.value, wide.grid)) == pytest.approx(1, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 20),
    probes=st.integers(1, 4),
    steps=st.integers(1, 25),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_any_small_matrix(n: int, probes: int, steps: int, seed: int, data: st.DataObject) -> None:
    values = uniform(n, -1, 1, seed)
    values[: data.draw(st.integers(0, n))] = 0
    operator = MatrixOperator(planted(values, seed))
    k = data.draw(st.integers(0, n - 1))
    deflate = top_eigenvalues(operator, k, tol=1e-10, max_matvecs=1000) if k else None
    density = spectral_density(operator, probes, steps, seed=seed, deflate=deflate)
    assert density.moment(0)[0] == pytest.approx(1, abs=1e-12)
    assert max(map(len, density.nodes)) <= min(steps, n - k)
    assert density.cumulative(torch.tensor([-2.0, 2.0])).value.tolist() == pytest.approx([0, 1])
    assert density.quantile(0.0) == pytest.approx(float(values.min()), abs=1e-9) or steps < n
    assert -1 - 1e-9 <= density.quantile(0.0) <= density.quantile(1.0) <= 1 + 1e-9
    for curve in (density.log_density(), density.density()):
        assert float(torch.trapezoid(curve.value, curve.position)) == pytest.approx(1, abs=1e-3)
        assert bool(torch.isnan(curve.standard_error).all()) == (probes == 1)


def test_zero_matrix() -> None:
    density = spectral_density(MatrixOperator(torch.zeros(5, 5)), 2, 3)
    assert (density.quantile(0.3), density.moment(2), density.floor) == (0.0, (0.0, 0.0), 0.0)
    curve = density.log_density()
    assert float(torch.trapezoid(curve.value, curve.position)) == pytest.approx(1, abs=1e-6)
    # Every vector is an eigenvector: the one deflated is the one that the first probe would start from.
    operator = MatrixOperator(torch.zeros(4, 4))
    density = spectral_density(operator, 2, 3, deflate=top_eigenvalues(operator, 1))
    assert density.quantile(0.5) == 0.0 and len(density.nodes) == 2


def test_quantile_takes_point_masses_in() -> None:
    rule = torch.tensor([1.0, 2.0], dtype=torch.float64)
    density = SpectralDensity(
        nodes=(rule, rule),
        weights=(torch.tensor([0.25, 0.75]).double(), torch.tensor([0.75, 0.25]).double()),
        deflated=torch.tensor([9.0, -3.0], dtype=torch.float64),
        n=10,
        floor=1e-15,
        num_matvecs=0,
    )
    # Masses: 0.1 at -3, 0.4 at 1, 0.4 at 2, 0.1 at 9.
    found = [density.quantile(q) for q in (0.05, 0.11, 0.45, 0.55, 0.85, 0.95, 1.0)]
    assert found == [-3, 1, 1, 2, 2, 9, 9]
    at_nodes = density.cumulative(torch.tensor([-3.0, 1.0, 2.0, 9.0])).value
    assert at_nodes.tolist() == pytest.approx([0.1, 0.5, 0.9, 1.0])
    value, error = density.moment(1)
    assert value == pytest.approx(0.8 * 1.5 + 0.6)
    assert error == pytest.approx(0.8 * 0.25)  # 0.8 * std of (1.75, 1.25) / sqrt(2)
    with pytest.raises(ValueError, match=r"fraction must be in 0..1, got 1\.5"):
        density.quantile(1.5)
    with pytest.raises(ValueError, match="sigma must be positive"):
        density.density(sigma=0.0)
    with pytest.raises(ValueError, match="threshold must be positive"):
        density.log_density(threshold=-1.0)


@pytest.mark.parametrize("threshold", [1e-10, 1.0])
def test_signed_log_is_odd_monotonic_and_invertible(threshold: float) -> None:
    x = torch.tensor([-1e6, -1.0, -1e-9, 0.0, 1e-12, 1e-3, 1e8], dtype=torch.float64)
    y = signed_log(x, threshold)
    assert bool((y.diff() > 0).all()) and float(y[3]) == 0.0
    assert torch.allclose(signed_log(-x, threshold), -y)
    assert torch.allclose(signed_exp(y, threshold), x, rtol=1e-12, atol=0)
    assert float(y[-1]) == pytest.approx(8 - math.log10(threshold), abs=1e-12)


def test_deterministic_by_seed_and_argument_mistakes() -> None:
    operator = MatrixOperator(planted(uniform(30, -1, 1)))
    first = spectral_density(operator, 3, 8, seed=1)
    torch.manual_seed(0)
    assert equal(first, spectral_density(operator, 3, 8, seed=1))
    assert not equal(first, spectral_density(operator, 3, 8, seed=2))
    run: LanczosRun = lanczos(operator, gaussian(30), 5)
    for probes, runs in ((0, []), (1, [run, run])):
        with pytest.raises(ValueError, match="num_probes must be at least 1"):
            spectral_density(operator, probes, 4, runs=runs)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        spectral_density(operator, 2, 0)


def test_not_finite() -> None:
    with pytest.raises(SpecDefError, match="NaN or infinite"):
        spectral_density(MatrixOperator(torch.full((4, 4), math.nan)), 1, 2)
