"""Lanczos tridiagonalisation with full re-orthogonalisation, and the Gauss quadrature that comes with it.

Every vector is orthogonalised against all before it by classical Gram–Schmidt, twice (Daniel, Gragg, Kaufman & Stewart
1976): without, rounding brings converged eigenvalues back as ghost copies. The quadrature (Golub & Meurant 2010) survives
that (Greenbaum 1989), so the variant that keeps three vectors serves densities and quadratic forms, not eigenvalues.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specdef.curvature.basis import Rows, norm, product, working_dtype
from specdef.curvature.linear import SymmetricOperator
from specdef.errors import SpecDefError
from specdef.spectral.prepare import full_precision

# A next vector shorter than this many eps, relative to T, is rounding. Where it is a little longer and yet rounding, going
# on does no harm: it couples to T by rounding only, and its vector is as good as a fresh random one.
_BREAKDOWN = 4
# Share of a vector that one pass of orthogonalisation may take off without another.
_SMALL_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LanczosRun:
    """m steps of Lanczos: A Q = Q T + residual_norm q e_m^T, with T = Q^T A Q tridiagonal.

    Args:
        diagonal: `[m]` float64 on the CPU, the diagonal of T.
        off_diagonal: `[m - 1]` float64 on the CPU, positive.
        residual_norm: The next off-diagonal entry, in the units of A.
        start_norm: Norm of the start vector, so that start^T f(A) start = start_norm^2 sum_j w_j f(l_j).
        basis: Q^T `[m, n]`, orthonormal rows, the first of them start / start_norm; None if not kept.
        tail: `[2, n]`, the last vector of the basis and the next one: what `lanczos(resume=...)` goes on from. It may
            share memory with `basis`. None where `exhausted`, or where neither was kept.
        exhausted: The Krylov space is A-invariant to rounding: the nodes are eigenvalues, and more steps add none.
        num_matvecs: Products spent, those of the runs it resumed included.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    residual_norm: float
    start_norm: float
    basis: Tensor | None
    tail: Tensor | None
    exhausted: bool
    num_matvecs: int

    @property
    def num_steps(self) -> int:
        """Steps made, m."""
        return len(self.diagonal)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the eigenvalues of T, their vectors and residuals.

        Returns:
            Values `[m]` ascending; coordinates `[m, m]`, one column for each, so that `coordinates.T @ basis` are the
            Ritz vectors; residuals `[m]`, ||A v - value v|| = residual_norm |last coordinate|. All float64.
        """
        values, coordinates = torch.linalg.eigh(_dense(self.diagonal, self.off_diagonal))
        return values, coordinates, self.residual_norm * coordinates[-1].abs()

    def nodes_and_weights(self) -> tuple[Tensor, Tensor]:
        """Return the Gauss quadrature of the start vector's spectral measure.

        sum_j w_j p(l_j) = u^T p(A) u, u = start / start_norm, for every polynomial p of degree up to 2 m - 1; for every
        p if `exhausted`.

        Returns:
            Nodes `[m]` ascending and weights `[m]`, positive, with sum 1. Both float64.
        """
        values, coordinates, _ = self.ritz()
        return values, coordinates[0] ** 2


def lanczos(
    operator: SymmetricOperator,
    start: Tensor | None,
    num_steps: int,
    *,
    reorthogonalize: bool = True,
    keep_basis: bool | None = None,
    resume: LanczosRun | None = None,
) -> LanczosRun:
    """Tridiagonalise a symmetric operator from a start vector.

    q_1 = start / |start|, b_j q_(j+1) = A q_j - a_j q_j - b_(j-1) q_(j-1).

    Cost: one product a step, and 2 j passes over a vector in step j for the orthogonalisation (4 j at worst). Memory: num_steps + 4
    vectors of n numbers (float32 unless the operator is float64: 60 steps at n = 1e6 are 256 MB), twice that for a moment
    when a run is resumed; with `reorthogonalize=False` and no basis 5 vectors.

    Args:
        operator: A.
        start: `[n]`, finite, not zero; None with `resume`.
        num_steps: Length m of the whole run, 1..n. The run is shorter where the Krylov space is exhausted.
        reorthogonalize: Keep the basis orthogonal. Without, T has ghost copies of eigenvalues that have converged: its
            nodes and weights are still good, its eigenvalues cannot be counted.
        keep_basis: Return the basis. By default, if `reorthogonalize`.
        resume: A run of the same operator and the same options to extend to `num_steps`. It stays usable.

    Returns:
        The run.

    Raises:
        ValueError: An argument is out of range, or `resume` has not kept what is needed.
        SpecDefError: The start or a product is NaN or infinite.

    Example:
        >>> from specdef.curvature.linear import MatrixOperator
        >>> run = lanczos(MatrixOperator(torch.diag(torch.tensor([3.0, 1.0]))), torch.ones(2), 2)
        >>> [round(x, 5) for x in (*run.nodes_and_weights()[0].tolist(), run.start_norm**2)]
        [1.0, 3.0, 2.0]
    """
    n = operator.shape[0]
    keep_basis = reorthogonalize if keep_basis is None else keep_basis
    if not 1 <= num_steps <= n:
        raise ValueError(f"num_steps must be in 1..n = {n}, got {num_steps}.")
    if (start is None) == (resume is None):
        raise ValueError("Give start or resume, not both.")
    if start is not None and start.shape != (n,):
        raise ValueError(f"start must be [{n}], got {list(start.shape)}.")
    if resume is not None:
        if resume.num_steps > num_steps:
            raise ValueError(f"num_steps must be at least resume's {resume.num_steps}.")
        if resume.exhausted:
            return resume
        if resume.tail is None or (resume.basis is None and (reorthogonalize or keep_basis)):
            raise ValueError("resume must have kept its basis: run it with keep_basis=True.")
    window = None if reorthogonalize else 2
    with full_precision(operator.device):
        rolling = not (reorthogonalize or keep_basis)
        chunk = 2 if rolling else num_steps + 1
        process = Krylov(operator, chunk=chunk, window=window, rolling=rolling)
        if resume is not None:
            process.adopt(resume)
        else:
            assert start is not None
            process.begin(start)
        while process.num_steps < num_steps and not process.exhausted:
            process.step()
    return process.run(keep_basis=keep_basis)


class Krylov:
    """A basis of a Krylov space that grows by one product a step, and T, the projection of A on it.

    Invariant, to rounding: the rows of the basis are orthonormal and A Q = Q T + beta q e_m^T, where m is the number of
    steps, q the row after the first m, and T = `projected()`.

    Args:
        operator: A.
        chunk: Rows allocated at a time: all of them, where their number is known.
        window: How many of the last vectors a new one is orthogonalised against; None for all.
        rolling: Keep two vectors only.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        *,
        chunk: int,
        window: int | None = None,
        rolling: bool = False,
    ) -> None:
        self.operator, self.window, self.rolling = operator, window, rolling
        dtype = working_dtype(operator)
        self.rows = Rows(operator.shape[0], chunk, dtype, operator.device)
        self.eps = torch.finfo(dtype).eps
        self.start_norm = self.beta = 0.0
        self.num_matvecs = 0
        self.exhausted = False
        # T: after a restart its first len(head) rows are diagonal, and couple to the next row alone.
        self.head = self.coupling = torch.zeros(0, dtype=torch.float64)
        self.diagonal: list[float] = []
        self.off_diagonal: list[float] = []
        self.size = 0.0  # largest entry of T met, which is ||A|| to a factor of about 2

    @property
    def num_steps(self) -> int:
        """Rows of T, m."""
        return len(self.head) + len(self.diagonal)

    def begin(self, start: Tensor) -> None:
        """Set the first vector."""
        start = start.detach().to(self.rows.device, self.rows.dtype)
        self.start_norm = norm(start)
        if not math.isfinite(self.start_norm):
            raise SpecDefError(
                "The start vector of Lanczos is NaN or infinite.",
                hint="Check that the gradient, or whatever it was made of, is finite.",
            )
        if self.start_norm == 0.0:
            raise ValueError("start must not be zero.")
        self.rows.append(start / self.start_norm)

    def adopt(self, run: LanczosRun) -> None:
        """Take over where a run stopped."""
        assert run.tail is not None
        if run.basis is not None and not self.rolling:
            self.rows.append(*run.basis, run.tail[-1])
        else:
            self.rows.append(*run.tail)
        self.start_norm, self.beta, self.num_matvecs = (
            run.start_norm,
            run.residual_norm,
            run.num_matvecs,
        )
        self.diagonal, self.off_diagonal = run.diagonal.tolist(), run.off_diagonal.tolist()
        self.off_diagonal.append(run.residual_norm)
        self.size = max(map(abs, self.diagonal + self.off_diagonal))

    def step(self) -> None:
        """Multiply the newest vector by A, and make the next one of what is orthogonal to the basis."""
        image = product(self.operator, self.rows[-1])
        self.num_matvecs += 1
        rest, alpha, self.beta = self._orthogonalise(image)
        self.diagonal.append(alpha)
        self.size = max(self.size, abs(alpha), self.beta)
        full = self.num_steps == self.rows.n and self.window is None
        self.exhausted = full or self.beta <= _BREAKDOWN * self.eps * self.size
        if not self.exhausted:
            self.off_diagonal.append(self.beta)
            self._append(rest / self.beta)

    def bridge(self, vector: Tensor) -> None:
        """Go on from an exhausted space of less than n dimensions with a random vector's part orthogonal to it."""
        rest, _, length = self._orthogonalise(vector.to(self.rows.device, self.rows.dtype))
        self.beta, self.exhausted = 0.0, False
        self.off_diagonal.append(0.0)
        self._append(rest / length)

    def restart(self, values: Tensor, coordinates: Tensor) -> None:
        """Replace the basis by Ritz vectors: `values` `[p]` of T and their `coordinates` `[m, p]`."""
        newest = self.rows[-1].clone()
        self.rows.combine_(coordinates)
        self.rows.append(newest)
        self.head, self.coupling = values, self.beta * coordinates[-1]
        self.diagonal, self.off_diagonal = [], []

    def projected(self) -> Tensor:
        """Return T `[m, m]`, float64."""
        p, m = len(self.head), self.num_steps
        T = torch.zeros(m, m, dtype=torch.float64)
        T[:p, :p] = self.head.diag()
        tail = torch.tensor(self.diagonal, dtype=torch.float64)
        T[p:, p:] = _dense(tail, torch.tensor(self.off_diagonal[: m - p - 1], dtype=torch.float64))
        if m > p:
            T[:p, p] = T[p, :p] = self.coupling
        return T

    def run(self, *, keep_basis: bool, copy: bool = False) -> LanczosRun:
        """Return the state as a run; with `copy`, steps and restarts to come leave it as it is."""
        m, count = self.num_steps, len(self.rows)
        keep_tail = (keep_basis or self.rolling) and not self.exhausted
        return LanczosRun(
            diagonal=torch.tensor(self.diagonal, dtype=torch.float64),
            off_diagonal=torch.tensor(self.off_diagonal[: m - 1], dtype=torch.float64),
            residual_norm=self.beta,
            start_norm=self.start_norm,
            basis=self.rows.block(0, m, copy=copy) if keep_basis else None,
            tail=self.rows.block(count - 2, count, copy=copy) if keep_tail else None,
            exhausted=self.exhausted,
            num_matvecs=self.num_matvecs,
        )

    def _append(self, row: Tensor) -> None:
        if self.rolling and len(self.rows) == 2:
            self.rows.drop_first()
        self.rows.append(row)

    def _orthogonalise(self, vector: Tensor) -> tuple[Tensor, float, float]:
        """Return the part orthogonal to the basis, the last coefficient, and the part's norm."""
        # What exact arithmetic would leave goes first, so that the whole basis has little to take off.
        local = self.rows.dot(vector, 2)
        rest, alpha = self.rows.minus(vector, local, 2), float(local[-1])
        # One pass is enough unless it takes off a large share, and two always are (Daniel et al. 1976; Parlett 1980, 6.9).
        for _ in range(2):
            part = self.rows.dot(rest, self.window)
            rest = self.rows.minus(rest, part, self.window)
            alpha += float(part[-1])
            length = norm(rest)
            if norm(part) <= _SMALL_SHARE * length:
                break
        return rest, alpha, length


def _dense(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    """Return the tridiagonal matrix."""
    return diagonal.diag() + off_diagonal.diag(1) + off_diagonal.diag(-1)
