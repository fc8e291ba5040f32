"""Extreme eigenvalues against planted spectra: exact to rounding, honest about convergence, no ghosts, bounded memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planted import gaussian, naive_lanczos, planted, uniform
from specdef.curvature import eigenvalues
from specdef.curvature.eigenvalues import Eigenvalues, Which, top_eigenvalues
from specdef.curvature.lanczos import lanczos
from specdef.curvature.linear import DeflatedOperator, MatrixOperator, SymmetricOperator
from specdef.errors import NotConverged, SpecDefError


class Diagonal(SymmetricOperator):
    """A diagonal matrix: to Lanczos from a Gaussian vector no basis is special."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(len(values), dtype=values.dtype, device="cpu")
        self.values = values

    def _matvec(self, v: Tensor) -> Tensor:
        return self.values * v


def topped(*top: float, n: int, rest: float = 1e-2) -> Tensor:
    """Return values above a Gaussian bulk."""
    values = rest * gaussian(n, seed=n)
    values[: len(top)] = torch.tensor(top, dtype=torch.float64)
    return values


def spectrum(name: str, n: int) -> Tensor:
    index = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "outliers": topped(10, 6, 3, 2, 1.5, 1.2, n=n),
        "both ends": topped(10, -9, 3, 2.9, -1.5, 1.2, n=n),
        "power-1": 10 / index,
        "power-0.5": 10 / index**0.5,
        "edge": topped(1, 0.5, 0.1, n=n),
        # Pairs that a Ritz value passes through on its way to the larger one.
        "close": topped(10, 9.9, 9.8, 3, 2.99, 2.98, 1, n=n),
        "twins": topped(10, 6, 3, 2.002, 2.0, 1.2, n=n),
        "negative": -10 / index,
    }[name]


SPECTRA = ["outliers", "both ends", "power-1", "power-0.5", "edge", "close", "twins", "negative"]


def wanted(values: Tensor, k: int, which: str) -> Tensor:
    key = {"LM": -values.abs(), "LA": -values, "SA": values}[which]
    return values[key.argsort()][:k]


def check_residuals(A: Tensor, result: Eigenvalues, tolerance: float) -> None:
    """Assert that vectors are orthonormal and residuals the true ones."""
    assert result.vectors is not None
    V = result.vectors.double()
    k = len(result.values)
    eye = torch.eye(k, dtype=torch.float64)
    assert float((V @ V.T - eye).abs().max()) <= tolerance
    true = (V @ A - result.values[:, None] * V).norm(dim=1)
    scale = float(torch.linalg.matrix_norm(A, 2)) or 1.0
    assert float((true - result.residuals).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("name", SPECTRA)
def test_planted_to_rounding(name: str, which: Which) -> None:
    values = spectrum(name, 250)
    A = planted(values)
    exact = wanted(values, 6, which)
    result = top_eigenvalues(MatrixOperator(A), 6, which=which, tol=1e-12, max_matvecs=250)
    assert bool(result.converged.all())
    assert float((result.values - exact).abs().max()) <= 1e-10 * float(values.abs().max())
    check_residuals(A, result, 1e-12)
    assert {result.values.dtype, result.residuals.dtype} == {torch.float64}
    assert result.converged.dtype == torch.bool


@pytest.mark.parametrize("name", SPECTRA)
def test_three_digits_in_few_products(name: str) -> None:
    values = spectrum(name, 20000)
    exact = wanted(values, 5, "LM")
    for seed in range(6):
        operator = Diagonal(values)
        result = top_eigenvalues(operator, 5, seed=seed, vectors=False)
        error = (result.values - exact).abs()
        assert bool(result.converged.all()) and result.vectors is None
        assert bool((error <= 1e-3 * exact.abs()).all())
        assert result.num_matvecs == operator.num_matvecs <= 55


def test_stops_on_the_error_of_the_values_not_of_the_vectors() -> None:
    result = top_eigenvalues(Diagonal(spectrum("power-0.5", 20000)), 5)
    assert bool(result.converged.all())
    # The residual alone would ask for more products.
    assert bool((result.residuals > 1e-3 * result.values.abs()).any())
    tight = top_eigenvalues(Diagonal(spectrum("power-0.5", 20000)), 5, tol=1e-10)
    assert tight.num_matvecs > result.num_matvecs
    assert bool(((tight.values - result.values).abs() <= result.errors * 1.01).all())


def test_a_value_on_its_way_is_not_called_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    values = spectrum("twins", 20000)
    exact = wanted(values, 5, "LM")

    def wrong() -> int:
        results = [top_eigenvalues(Diagonal(values), 5, seed=seed) for seed in range(12)]
        errors = [float(((r.values - exact) / exact).abs().max()) for r in results]
        return sum(error > 1e-3 for error in errors)

    assert wrong() == 0
    monkeypatch.setattr(eigenvalues, "_STILL", 0)
    assert wrong() > 0


@pytest.mark.parametrize("max_basis", [8, 9, 12, 20, 60])
@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("name", ["both ends", "power-0.5", "close"])
def test_thick_restart_keeps_the_answer(name: str, which: Which, max_basis: int) -> None:
    values = spectrum(name, 300) * (-1 if which == "SA" else 1)
    A = planted(values)
    exact = wanted(values, 5, which)
    result = top_eigenvalues(
        MatrixOperator(A), 5, which=which, tol=1e-11, max_basis=max_basis, max_matvecs=6000
    )
    assert bool(result.converged.all())
    assert float((result.values - exact).abs().max()) <= 1e-10 * float(values.abs().max())
    check_residuals(A, result, 1e-12)
    assert result.run.num_steps == min(max_basis, result.num_matvecs)
    assert max_basis > 12 or result.num_matvecs > max_basis


def test_thick_restart_bounds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    step = eigenvalues.Krylov.step

    def spy(space: eigenvalues.Krylov) -> None:
        step(space)
        rows.append(sum(len(chunk) for chunk in space.rows.chunks))

    monkeypatch.setattr(eigenvalues.Krylov, "step", spy)
    result = top_eigenvalues(
        Diagonal(spectrum("power-0.5", 5000)), 4, tol=1e-13, max_basis=12, max_matvecs=100
    )
    assert result.num_matvecs > 25 and max(rows) == 16
    rows.clear()
    monkeypatch.setattr(eigenvalues, "_BASIS_BYTES", 40 * 5000 * 8)
    result = top_eigenvalues(Diagonal(spectrum("edge", 5000)), 5, tol=1e-13, max_matvecs=200)
    assert result.num_matvecs > 40 and max(rows) == 48


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 25),
    data=st.data(),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-8, 8),
)
def test_small_matrices(n: int, data: st.DataObject, seed: int, exponent: int) -> None:
    k = data.draw(st.integers(1, n))
    which = data.draw(st.sampled_from(["LM", "LA", "SA"]))
    max_basis = data.draw(st.none() | st.integers(min(k + 3, n), n))
    values = uniform(n, -1, 1, seed) * 10.0**exponent
    A = planted(values, seed)
    result = top_eigenvalues(
        MatrixOperator(A), k, which=which, tol=1e-12, max_basis=max_basis, max_matvecs=3000
    )
    assert bool(result.converged.all())
    exact = wanted(torch.linalg.eigvalsh(A), k, which)
    error = (result.values - exact).abs().max() / values.abs().max()
    assert float(error) <= 1e-10
    check_residuals(A, result, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_spectrum_k_equals_n(dtype: torch.dtype) -> None:
    A = planted(uniform(120, -1, 1)).to(dtype)
    result = top_eigenvalues(MatrixOperator(A), 120, which="SA")
    assert bool(result.converged.all()) and result.num_matvecs == 120
    eps = torch.finfo(dtype).eps
    exact = torch.linalg.eigvalsh(A.double())
    assert float((result.values - exact).abs().max()) <= 20 * eps
    assert result.vectors is not None and result.vectors.dtype == dtype


@pytest.mark.parametrize("matrix", ["zero", "identity", "rank one"])
def test_few_distinct_eigenvalues(matrix: str) -> None:
    n = 9
    A = {
        "zero": torch.zeros(n, n),
        "identity": 3 * torch.eye(n),
        "rank one": torch.ones(n, n),
    }[matrix]
    exact = {"zero": [0.0] * 4, "identity": [3.0] * 4, "rank one": [9.0, 0, 0, 0]}[matrix]
    result = top_eigenvalues(MatrixOperator(A.double()), 4)
    assert result.values.tolist() == pytest.approx(exact, abs=1e-12)
    assert bool(result.converged.all())
    check_residuals(A.double(), result, 1e-12)
    assert top_eigenvalues(MatrixOperator(A), n).values.shape == (n,)
    # The run is what one start vector reaches: a quadrature of its measure.
    assert result.run.exhausted and result.run.num_steps == (2 if matrix == "rank one" else 1)


def test_an_eigenvalue_of_zero_converges_to_rounding() -> None:
    values = uniform(200, 5, 6)
    values[0] = 0.0
    result = top_eigenvalues(MatrixOperator(planted(values)), 1, which="SA")
    assert bool(result.converged.all()) and result.num_matvecs < 40
    assert abs(float(result.values[0])) <= float(result.errors[0]) < 1e-13


def test_one_copy_of_a_repeated_eigenvalue() -> None:
    values = topped(5, 5, 4, 3, n=300)
    operator = MatrixOperator(planted(values))
    found = top_eigenvalues(operator, 2, tol=1e-8)
    # What the docstring promises: one copy, and a way to the other.
    assert bool(found.converged.all())
    assert found.values.tolist() == pytest.approx([5, 4], rel=1e-8)
    assert found.vectors is not None
    missed = top_eigenvalues(DeflatedOperator(operator, found.vectors), 1, tol=1e-8, seed=1)
    assert missed.values.tolist() == pytest.approx([5], rel=1e-8)
    # Where nothing was missed, what comes next is smaller.
    both = torch.linalg.qr(torch.cat([found.vectors, missed.vectors]).T)[0].T  # type: ignore[list-item]
    rest = top_eigenvalues(DeflatedOperator(operator, both), 1, tol=1e-8, seed=2)
    assert rest.values.tolist() == pytest.approx([3], rel=1e-8)


def test_no_ghosts() -> None:
    # One eigenvalue 1e3 times the bulk converges at once; without re-orthogonalisation it comes back (FACTS 6.6).
    values = topped(1e3, 5, 4, 3, 2, n=500, rest=0.3)
    operator = MatrixOperator(planted(values).float())
    result = top_eigenvalues(operator, 5)
    assert bool(result.converged.all())
    assert result.values.tolist() == pytest.approx([1e3, 5, 4, 3, 2], rel=2e-3)
    steps = max(60, result.num_matvecs)
    ghostly = lanczos(operator, gaussian(500).float(), steps, reorthogonalize=False).ritz()[0]
    assert abs(float(ghostly.sort(descending=True)[0][4]) / 2.0 - 1) > 0.5


def test_equals_a_naive_transcription() -> None:
    A = planted(spectrum("both ends", 100))
    result = top_eigenvalues(MatrixOperator(A), 3, seed=5, max_matvecs=7)
    T, basis, beta = naive_lanczos(A, gaussian(100, seed=5), 7)
    values, coordinates = torch.linalg.eigh(T)
    order = values.abs().argsort(descending=True)[:3]
    assert float((result.values - values[order]).abs().max()) <= 1e-10
    residuals = beta * coordinates[-1, order].abs()
    assert float((result.residuals - residuals).abs().max()) <= 1e-10
    assert result.vectors is not None
    # Every other Ritz value may come closer by its residual.
    every = beta * coordinates[-1].abs()
    for i, j in enumerate(order.tolist()):
        gap = min(abs(values[j] - values[o]) - every[o] for o in range(len(values)) if o != j)
        error = min(every[j], every[j] ** 2 / max(gap, 1e-300))
        floor = 10 * 2.0**-52 * float(values.abs().max())
        assert float(result.errors[i]) == pytest.approx(max(float(error), floor), rel=1e-5)
    overlap = (result.vectors * (coordinates[:, order].T @ basis)).sum(1).abs()
    assert overlap.tolist() == pytest.approx([1, 1, 1], abs=1e-10)
    assert result.run.basis is None
    assert float((result.run.diagonal - T.diagonal()).abs().max()) <= 1e-10
    assert float((result.run.off_diagonal - T.diagonal(1)).abs().max()) <= 1e-10


@pytest.mark.parametrize("max_basis", [None, 9, 17])
def test_run_that_keeps_its_basis_can_be_resumed(max_basis: int | None) -> None:
    values = spectrum("power-0.5", 200)
    operator = MatrixOperator(planted(values))
    found = top_eigenvalues(operator, 3, tol=1e-9, max_basis=max_basis, keep_basis=True)
    run = found.run
    assert run.basis is not None
    longer = lanczos(operator, None, 60, resume=run)
    whole = lanczos(operator, gaussian(200), 60)
    assert float((longer.diagonal - whole.diagonal).abs().max()) <= 1e-8
    assert longer.num_matvecs == 60


def test_deterministic_by_seed() -> None:
    values = spectrum("outliers", 400)
    first = top_eigenvalues(Diagonal(values), 4, seed=3)
    torch.manual_seed(1)
    again = top_eigenvalues(Diagonal(values), 4, seed=3)
    other = top_eigenvalues(Diagonal(values), 4, seed=4)
    assert torch.equal(first.values, again.values) and torch.equal(first.errors, again.errors)
    assert first.vectors is not None and again.vectors is not None
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.residuals, other.residuals)


def test_strict() -> None:
    operator = Diagonal(spectrum("power-0.5", 2000))
    loose = top_eigenvalues(operator, 5, max_matvecs=9)
    assert not bool(loose.converged.all()) and loose.num_matvecs == 9
    with pytest.raises(NotConverged, match="of 5 eigenvalues converged in 9 products") as caught:
        top_eigenvalues(operator, 5, max_matvecs=9, strict=True)
    result = caught.value.result
    assert isinstance(result, Eigenvalues) and torch.equal(result.values, loose.values)
    assert "max_matvecs" in caught.value.hint
    assert bool(top_eigenvalues(operator, 5, strict=True).converged.all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k must be in 1..n = 6, got 0\."),
        ({"k": 7}, r"k must be in 1..n = 6, got 7\."),
        ({"k": 2, "tol": 0.0}, "tol must be positive"),
        ({"k": 2, "tol": math.nan}, "tol must be positive"),
        ({"k": 3, "max_matvecs": 2}, "max_matvecs must be at least k = 3, got 2"),
        ({"k": 2, "max_basis": 4}, r"max_basis must be at least k \+ 3 = 5, got 4"),
    ],
)
def test_argument_mistakes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_eigenvalues(MatrixOperator(torch.eye(6)), **arguments)  # type: ignore[arg-type]


def test_not_finite_product() -> None:
    matrix = torch.eye(5)
    matrix[1, 1] = math.nan
    with pytest.raises(SpecDefError, match="NaN or infinite") as caught:
        top_eigenvalues(MatrixOperator(matrix), 2)
    assert caught.value.hint
