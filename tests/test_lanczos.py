"""Lanczos against the textbook, its quadrature against polynomials, and what rounding does without orthogonality."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planted import gaussian, naive_lanczos, planted, uniform
from specdef.curvature.basis import Rows, norm
from specdef.curvature.lanczos import Krylov, LanczosRun, lanczos
from specdef.curvature.linear import MatrixOperator, SymmetricOperator
from specdef.errors import SpecDefError

# T and nodes relative to ||A||; orthonormality absolute.
TOLERANCE = {torch.float64: (1e-10, 1e-13), torch.float32: (2e-5, 2e-6)}


def tridiagonal(run: LanczosRun) -> Tensor:
    return run.diagonal.diag() + run.off_diagonal.diag(1) + run.off_diagonal.diag(-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_textbook(dtype: torch.dtype) -> None:
    A, start = planted(uniform(80, -1, 3)), gaussian(80)
    T, basis, beta = naive_lanczos(A, start, 12)
    run = lanczos(MatrixOperator(A.to(dtype)), start.to(dtype), 12)
    close, orthogonal = TOLERANCE[dtype]
    assert (run.num_steps, run.num_matvecs, run.exhausted) == (12, 12, False)
    assert float((tridiagonal(run) - T).abs().max()) <= close
    assert abs(run.residual_norm - beta) <= close
    assert run.start_norm == pytest.approx(float(start.norm()), rel=1e-6)
    assert run.basis is not None and run.basis.dtype == dtype
    assert float((run.basis.double() - basis).abs().max()) <= 10 * close
    gram = run.basis.double() @ run.basis.double().T
    assert float((gram - torch.eye(12, dtype=torch.float64)).abs().max()) <= orthogonal
    if dtype == torch.float64:
        assert run.tail is not None
        left = A @ run.basis.T - run.basis.T @ tridiagonal(run)
        left[:, -1] -= run.residual_norm * run.tail[1]
        assert float(left.abs().max()) <= 1e-13


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_orthogonal_after_convergence(dtype: torch.dtype) -> None:
    values = uniform(300, -1, 1)
    values[:3] = torch.tensor([1e4, 3e3, -1e3])
    run = lanczos(MatrixOperator(planted(values).to(dtype)), gaussian(300).to(dtype), 120)
    assert run.basis is not None
    gram = run.basis.double() @ run.basis.double().T
    assert float((gram - torch.eye(120)).abs().max()) <= TOLERANCE[dtype][1]


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(2, 30),
    steps=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-6, 6),
)
def test_quadrature_is_exact_for_polynomials(n: int, steps: int, seed: int, exponent: int) -> None:
    steps = min(steps, n)
    A = planted(uniform(n, -1, 1, seed), seed)
    start = gaussian(n, seed + 1)
    run = lanczos(MatrixOperator(A * 10.0**exponent), start, steps)
    nodes, weights = run.nodes_and_weights()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((weights >= 0).all())
    power = start
    for degree in range(2 * steps):
        expected = float(start @ power)
        found = run.start_norm**2 * float(weights @ (nodes / 10.0**exponent) ** degree)
        assert found == pytest.approx(expected, abs=1e-10 * run.start_norm**2)
        power = A @ power


def test_quadrature_is_not_exact_beyond() -> None:
    A, start = planted(uniform(30, -1, 1)), gaussian(30)
    nodes, weights = lanczos(MatrixOperator(A), start, 3).nodes_and_weights()
    u = start / start.norm()
    true = float(u @ torch.linalg.matrix_power(A, 6) @ u)
    assert abs(float(weights @ nodes**6) - true) > 1e-4 * true


def test_ritz_residuals_are_the_true_ones() -> None:
    A = planted(uniform(60, -1, 1))
    run = lanczos(MatrixOperator(A), gaussian(60), 15)
    values, coordinates, residuals = run.ritz()
    assert run.basis is not None
    vectors = coordinates.T @ run.basis
    true = (vectors @ A - values[:, None] * vectors).norm(dim=1)
    assert float((true - residuals).abs().max()) <= 1e-13


# One eigenvalue 1e3 times the bulk: it converges within a few steps, and what rounding leaves of it grows back.
GHOSTS = torch.cat([torch.tensor([1e3, 5.0, 4.0, 3.0, 2.0]), uniform(495, -1, 1)]).double()


def test_ghosts_without_reorthogonalisation() -> None:
    operator, start = MatrixOperator(planted(GHOSTS).float()), gaussian(500).float()
    ghostly = lanczos(operator, start, 60, reorthogonalize=False).ritz()[0].flip(0)
    true = lanczos(operator, start, 60).ritz()[0].flip(0)
    assert float((true[:5] - GHOSTS[:5]).abs().max()) <= 1e-3 * 2
    copies = int((ghostly > 500).sum())
    assert copies > 1
    # The trap: the fifth value counted from the top is another one altogether.
    assert abs(float(ghostly[4]) - 2.0) > 0.5 * 2.0


def test_quadrature_survives_ghosts() -> None:
    operator, start = MatrixOperator(planted(GHOSTS).float()), gaussian(500).float()
    u = start.double() / start.double().norm()
    for steps in (20, 60, 120):
        run = lanczos(operator, start, steps, reorthogonalize=False)
        nodes, weights = run.nodes_and_weights()
        kept = lanczos(operator, start, steps).nodes_and_weights()
        eigenvalues, vectors = torch.linalg.eigh(planted(GHOSTS))
        measure = (u @ vectors) ** 2
        for function in (lambda x: x, lambda x: 1 / (x + 2), lambda x: (x / 1e3) ** 2):
            exact = float(measure @ function(eigenvalues))
            assert float(weights @ function(nodes)) == pytest.approx(exact, rel=1e-3)
            assert float(kept[1] @ function(kept[0])) == pytest.approx(exact, rel=1e-3)


def test_three_vectors_equal_the_textbook_before_ghosts() -> None:
    A, start = planted(uniform(80, -1, 3)), gaussian(80)
    run = lanczos(MatrixOperator(A), start, 12, reorthogonalize=False)
    assert run.basis is None and run.tail is not None and run.tail.shape == (2, 80)
    assert float((tridiagonal(run) - naive_lanczos(A, start, 12)[0]).abs().max()) <= 1e-10
    kept = lanczos(MatrixOperator(A), start, 12, reorthogonalize=False, keep_basis=True)
    assert kept.basis is not None and kept.basis.shape == (12, 80)
    assert torch.equal(kept.diagonal, run.diagonal)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("at", [1, 2, 13])
def test_resume_equals_one_go(dtype: torch.dtype, reorthogonalize: bool, at: int) -> None:
    operator = MatrixOperator(planted(uniform(90, -1, 3)).to(dtype))
    start = gaussian(90).to(dtype)
    whole = lanczos(operator, start, 30, reorthogonalize=reorthogonalize)
    part = lanczos(operator, start, at, reorthogonalize=reorthogonalize)
    before = (part.diagonal.clone(), None if part.basis is None else part.basis.clone())
    for _ in range(2):  # twice: the first run stays usable
        operator_matvecs = operator.num_matvecs
        rest = lanczos(operator, None, 30, reorthogonalize=reorthogonalize, resume=part)
        assert operator.num_matvecs - operator_matvecs == 30 - at
        assert rest.num_matvecs == 30
        assert torch.equal(rest.diagonal, whole.diagonal)
        assert torch.equal(rest.off_diagonal, whole.off_diagonal)
        assert rest.residual_norm == whole.residual_norm
        assert rest.start_norm == whole.start_norm
        if reorthogonalize:
            assert rest.basis is not None and whole.basis is not None
            assert torch.equal(rest.basis, whole.basis)
    assert torch.equal(part.diagonal, before[0])
    assert before[1] is None or (part.basis is not None and torch.equal(part.basis, before[1]))


def test_resume_needs_what_it_goes_on_from() -> None:
    operator, start = MatrixOperator(planted(uniform(20, -1, 1))), gaussian(20)
    dropped = lanczos(operator, start, 5, keep_basis=False)
    assert dropped.basis is None and dropped.tail is None
    with pytest.raises(ValueError, match="keep_basis"):
        lanczos(operator, None, 6, resume=dropped)
    kept = lanczos(operator, start, 5)
    with pytest.raises(ValueError, match="at least resume's 5"):
        lanczos(operator, None, 4, resume=kept)
    with pytest.raises(ValueError, match="start or resume"):
        lanczos(operator, start, 6, resume=kept)
    with pytest.raises(ValueError, match="start or resume"):
        lanczos(operator, None, 6)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_exhausted(reorthogonalize: bool) -> None:
    # Two eigenvalues: two steps span all that the start can reach.
    matrix = torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    run = lanczos(
        MatrixOperator(matrix), torch.ones(5), 5, reorthogonalize=reorthogonalize, keep_basis=True
    )
    assert run.exhausted and run.num_steps == 2 and run.tail is None
    nodes, weights = run.nodes_and_weights()
    assert nodes.tolist() == pytest.approx([1, 2]) and weights.tolist() == pytest.approx([0.6, 0.4])
    assert lanczos(MatrixOperator(matrix), None, 5, resume=run) is run


def test_low_rank_is_exhausted_soon() -> None:
    values = torch.zeros(200)
    values[:4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    run = lanczos(MatrixOperator(planted(values)), gaussian(200), 60)
    # Five distinct eigenvalues; rounding may pass for a direction once.
    assert run.exhausted and run.num_steps in (5, 6)
    for at in range(1, run.num_steps):
        part = lanczos(MatrixOperator(planted(values)), gaussian(200), at)
        rest = lanczos(MatrixOperator(planted(values)), None, 60, resume=part)
        assert rest.exhausted and torch.equal(rest.diagonal, run.diagonal)


def test_zero_matrix_and_whole_space() -> None:
    run = lanczos(MatrixOperator(torch.zeros(4, 4)), torch.ones(4), 3)
    assert (run.exhausted, run.num_steps, run.residual_norm) == (True, 1, 0.0)
    A = planted(uniform(25, -1, 1))
    run = lanczos(MatrixOperator(A), gaussian(25), 25)
    assert run.exhausted and run.num_steps == 25
    exact = torch.linalg.eigvalsh(A)
    assert float((run.ritz()[0] - exact).abs().max()) <= 1e-12
    assert lanczos(MatrixOperator(torch.full((1, 1), 3.0)), torch.ones(1), 1).exhausted


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e24])
def test_extreme_magnitudes_in_float32(scale: float) -> None:
    A = planted(uniform(40, 1, 3))
    run = lanczos(MatrixOperator((A * scale).float()), gaussian(40).float() * scale, 10)
    expected = lanczos(MatrixOperator(A), gaussian(40), 10)
    assert run.num_steps == 10
    assert run.start_norm / scale == pytest.approx(expected.start_norm, rel=1e-5)
    assert (run.diagonal / scale).tolist() == pytest.approx(expected.diagonal.tolist(), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_not_finite(bad: float, reorthogonalize: bool) -> None:
    matrix = torch.eye(6)
    matrix[2, 3] = bad
    with pytest.raises(SpecDefError, match="NaN or infinite") as caught:
        lanczos(MatrixOperator(matrix), torch.ones(6), 3, reorthogonalize=reorthogonalize)
    assert "weights" in caught.value.hint
    with pytest.raises(SpecDefError, match="start") as caught:
        lanczos(MatrixOperator(torch.eye(6)), torch.tensor([1, 2, bad, 0, 0, 0]), 3)
    assert caught.value.hint


def test_argument_mistakes() -> None:
    operator = MatrixOperator(torch.eye(4))
    for steps in (0, -1, 5):
        with pytest.raises(ValueError, match=rf"num_steps must be in 1..n = 4, got {steps}\."):
            lanczos(operator, torch.ones(4), steps)
    with pytest.raises(ValueError, match="must not be zero"):
        lanczos(operator, torch.zeros(4), 2)
    with pytest.raises(ValueError, match=r"start must be \[4\]"):
        lanczos(operator, torch.ones(3), 2)


class Alias(SymmetricOperator):
    """2 I, which returns its one buffer, and the identity, which returns its argument."""

    def __init__(self, n: int, *, identity: bool) -> None:
        super().__init__(n, dtype=torch.float64, device="cpu")
        self.buffer = None if identity else torch.arange(1.0, n + 1, dtype=torch.float64)
        self.out = torch.zeros(n, dtype=torch.float64)

    def _matvec(self, v: Tensor) -> Tensor:
        return v if self.buffer is None else torch.mul(self.buffer, v, out=self.out)


def test_an_operator_may_return_its_argument_or_one_buffer() -> None:
    run = lanczos(Alias(5, identity=True), torch.ones(5), 3)
    assert run.exhausted and run.basis is not None
    assert run.basis[0].tolist() == pytest.approx([5**-0.5] * 5)
    diagonal = Alias(6, identity=False)
    run = lanczos(diagonal, torch.ones(6), 6)
    assert run.ritz()[0].tolist() == pytest.approx([1, 2, 3, 4, 5, 6])


def test_memory_is_three_vectors_or_the_basis() -> None:
    process = Krylov(MatrixOperator(planted(uniform(8, -1, 1))), chunk=2, window=2, rolling=True)
    process.begin(gaussian(8))
    for _ in range(5):
        process.step()
    assert len(process.rows.chunks) == 1 and len(process.rows) == 2
    process = Krylov(MatrixOperator(planted(uniform(50, -1, 1))), chunk=16)
    process.begin(gaussian(50))
    for _ in range(20):
        process.step()
    assert [chunk.shape for chunk in process.rows.chunks] == [(16, 50)] * 2


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_chunks_change_nothing(chunk: int) -> None:
    M, v = planted(uniform(12, -1, 1))[:7], gaussian(12)
    rows = Rows(12, chunk, torch.float64, torch.device("cpu"))
    rows.append(*M)
    C = planted(uniform(7, -1, 1))[:, :4]
    assert torch.allclose(rows.dot(v, None), M @ v) and torch.allclose(rows.dot(v, 2), M[5:] @ v)
    c = gaussian(7)
    assert torch.allclose(rows.minus(v, c, None), v - M.T @ c)
    assert torch.allclose(rows.minus(v, c[5:], 2), v - M[5:].T @ c[5:])
    assert torch.equal(rows.block(2, 6), M[2:6]) and torch.equal(rows[-1], M[6])
    assert torch.allclose(rows.combine(C), C.T @ M)
    rows.combine_(C)
    assert len(rows) == 4 and torch.allclose(rows.block(0, 4), C.T @ M)
    rows.append(v)
    assert torch.equal(rows[4], v)


def test_norm_of_what_overflows_when_squared() -> None:
    assert norm(torch.tensor([3e30, 4e30])) == pytest.approx(5e30)
    assert norm(torch.tensor([3e-30, 4e-30])) == pytest.approx(5e-30)
    assert norm(torch.zeros(3)) == 0.0
    assert math.isnan(norm(torch.tensor([math.nan, 1.0])))
