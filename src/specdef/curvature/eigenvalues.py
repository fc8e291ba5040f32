"""The extreme eigenvalues of a symmetric operator, each with its residual and an estimate of its error.

Lanczos with full re-orthogonalisation, Rayleigh–Ritz, and thick restarts where memory is short (Wu & Simon 2000, the
symmetric case of Stewart's Krylov–Schur 2001).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specdef.curvature.basis import gaussian_vectors
from specdef.curvature.lanczos import Krylov, LanczosRun
from specdef.curvature.linear import SymmetricOperator
from specdef.errors import NotConverged
from specdef.spectral.prepare import full_precision

Which = Literal["LM", "LA", "SA"]
"""LM: largest magnitude. LA: largest (algebraic). SA: smallest (algebraic). The names are ARPACK's."""

# Vectors of the basis before a thick restart, unless told: as many as fit into 4 GiB, within these limits (and k + 10).
_BASIS_BYTES = 4 * 2**30
_BASIS = (30, 256)
# Rows allocated at a time.
_CHUNK = 16
# Values must have stood still for this many steps, or a tenth of the basis: a Ritz value on its way from one eigenvalue to
# a larger one that the start vector nearly misses has a small residual for a step or two (two eigenvalues 0.1 % apart:
# wrong in 4 of 12 runs without this, in none with it).
_STILL = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Eigenvalues:
    """k eigenvalues of A and how well they are known.

    Args:
        values: `[k]` float64 on the CPU; by magnitude, descending, for LM; descending for LA; ascending for SA.
        residuals: `[k]` float64, ||A v - value v|| with |v| = 1, in the units of A: some eigenvalue lies within it, to
            rounding. By Lanczos' formula, not by another product: noise of the products is not in it.
        errors: `[k]` float64, estimated distance to the eigenvalue: min(residual, residual^2 / gap), at least the rounding
            level 10 eps |A|.
        converged: `[k]` bool: the error is at most tol * |value|, or the rounding level, and the value stands still.
        num_matvecs: Products spent.
        vectors: `[k, n]`, orthonormal rows; None if not wanted.
        run: The Lanczos run behind them, from a Gaussian vector, up to the first restart: it serves `spectral_density` as a
            probe. It has its basis with `keep_basis` only.
    """

    values: Tensor
    residuals: Tensor
    errors: Tensor
    converged: Tensor
    num_matvecs: int
    vectors: Tensor | None
    run: LanczosRun


def top_eigenvalues(
    operator: SymmetricOperator,
    k: int,
    *,
    which: Which = "LM",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    max_basis: int | None = None,
    seed: int = 0,
    vectors: bool = True,
    keep_basis: bool = False,
    strict: bool = False,
) -> Eigenvalues:
    """Compute k extreme eigenvalues of a symmetric operator.

    The iteration stops on the error of the values, not of the vectors: a Ritz value with residual r and a gap g to the
    rest of the spectrum is off by at most r^2 / g (Kato 1949; Temple 1928), so that three digits of a value come long
    before three digits of its vector, whose angle to the eigenvector is about r / g. g is taken from the other Ritz
    values, each moved towards the value by its own residual, which makes the error an estimate and not a bound.

    One start vector finds one copy of a repeated eigenvalue, until rounding brings in another: of (5, 5, 4) the two
    largest found are 5 and 4. `top_eigenvalues(DeflatedOperator(H, found.vectors), 1, seed=other)` looks for what was
    missed. Only where the Krylov space is exhausted before it has k dimensions, a fresh vector is added, and copies are
    found. No eigenvalue is reported twice that is there once.

    Cost: 15 to 60 products for k = 5, where the values stand out of the bulk or decay like a power, and 2 j passes over a
    vector in step j. Memory: min(max_basis, steps rounded up to 16) + 4 vectors, and k for the result. Deterministic:
    same seed, same machine, same answer.

    Args:
        operator: A.
        k: How many, 1..n.
        which: Which end: LM, LA or SA.
        tol: Error accepted for a value, relative to itself. Errors of 10 eps |A| are always accepted.
        max_matvecs: Budget of products, at least k; by default max(300, 10 k).
        max_basis: Vectors kept before a thick restart, at least k + 3 (or n); by default what fits into 4 GiB, within
            30..256 and at least k + 10.
        seed: Of the random start.
        vectors: Whether to return the vectors.
        keep_basis: Whether `run` keeps its basis, a copy, so that it can be resumed.
        strict: Raise when an eigenvalue has not converged.

    Returns:
        The eigenvalues, also when some have not converged.

    Raises:
        ValueError: An argument is out of range.
        SpecDefError: A product is NaN or infinite.
        NotConverged: If `strict` and an eigenvalue has not converged; `.result` is the `Eigenvalues`.

    Example:
        >>> from specdef.curvature.linear import MatrixOperator
        >>> matrix = torch.diag(torch.tensor([3.0, -5.0, 1.0, 0.0]))
        >>> [round(value, 4) for value in top_eigenvalues(MatrixOperator(matrix), 2).values.tolist()]
        [-5.0, 3.0]
    """
    n = operator.shape[0]
    max_matvecs = max(300, 10 * k) if max_matvecs is None else max_matvecs
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..n = {n}, got {k}.")
    if which not in ("LM", "LA", "SA"):
        raise ValueError(f"which must be LM, LA or SA, got {which!r}.")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}.")
    if max_matvecs < k:
        raise ValueError(f"max_matvecs must be at least k = {k}, got {max_matvecs}.")
    if max_basis is not None and max_basis < min(k + 3, n):
        raise ValueError(f"max_basis must be at least k + 3 = {k + 3}, got {max_basis}.")
    search = _Search(operator, k, which, tol, max_basis, seed, keep_basis)
    with full_precision(operator.device):
        search.iterate(max_matvecs)
        result = search.result(vectors)
    if strict and not bool(result.converged.all()):
        found = int(result.converged.sum())
        raise NotConverged(
            f"top_eigenvalues: {found} of {k} eigenvalues converged in {result.num_matvecs} products",
            result=result,
            hint="Raise max_matvecs or tol.",
        )
    return result


class _Search:
    """The state of `top_eigenvalues`: a Krylov space, its Ritz values, and what they were before."""

    def __init__(
        self,
        operator: SymmetricOperator,
        k: int,
        which: Which,
        tol: float,
        max_basis: int | None,
        seed: int,
        keep_basis: bool,
    ) -> None:
        n = operator.shape[0]
        self.k, self.which, self.tol, self.keep_basis = k, which, tol, keep_basis
        self.space = Krylov(operator, chunk=min(_CHUNK, n + 1))
        if max_basis is None:
            fits = _BASIS_BYTES // (n * self.space.rows.dtype.itemsize)
            max_basis = max(k + 10, _BASIS[0], min(_BASIS[1], fits))
        self.max_basis = min(max_basis, n)
        self.starts = gaussian_vectors(operator, seed)
        self.run: LanczosRun | None = None
        self.history: list[tuple[int, Tensor]] = []  # the k values after so many products
        self.values = self.residuals = self.errors = torch.zeros(0, dtype=torch.float64)
        self.coordinates = torch.zeros(0, 0, dtype=torch.float64)
        self.converged = torch.zeros(0, dtype=torch.bool)

    def iterate(self, max_matvecs: int) -> None:
        """Extend the space until the eigenvalues have converged or the budget is spent."""
        space = self.space
        space.begin(next(self.starts))
        while True:
            space.step()
            m = space.num_steps
            last = space.num_matvecs >= max_matvecs or space.exhausted
            # From 64 on the small dense problem is no longer free.
            if m >= self.k and (last or m < 64 or m % 4 == 0 or m >= self.max_basis):
                self._project()
                if last or bool(self.converged.all()):
                    break
            if space.exhausted:
                self._keep_run()
                space.bridge(next(self.starts))
            elif m >= self.max_basis:
                self._keep_run()
                self._restart()
        self._keep_run()

    def result(self, vectors: bool) -> Eigenvalues:
        """Return the eigenvalues as they are now."""
        k = self.k
        assert self.run is not None
        return Eigenvalues(
            values=self.values[:k].clone(),
            residuals=self.residuals[:k].clone(),
            errors=self.errors,
            converged=self.converged,
            num_matvecs=self.space.num_matvecs,
            vectors=self.space.rows.combine(self.coordinates[:, :k]) if vectors else None,
            run=self.run,
        )

    def _project(self) -> None:
        """Compute the Ritz values, the wanted end first, with their errors."""
        space, k = self.space, self.k
        values, coordinates = torch.linalg.eigh(space.projected())
        key = {"LM": -values.abs(), "LA": -values, "SA": values}[self.which]
        order = key.argsort(stable=True)
        self.values, self.coordinates = values[order], coordinates[:, order]
        self.residuals = space.beta * self.coordinates[-1].abs()
        # Every other Ritz value may move towards ours by its residual.
        distance = (self.values[:k, None] - self.values).abs() - self.residuals
        distance[torch.arange(k), torch.arange(k)] = math.inf
        gap = distance.amin(1).clamp(min=torch.finfo(torch.float64).tiny)
        residual = self.residuals[:k]
        # Rounding level of a product, below which no value is known.
        floor = 10 * space.eps * float(values.abs().max())
        self.errors = torch.minimum(residual, residual * (residual / gap)).clamp(min=floor)
        allowed = (self.tol * self.values[:k].abs()).clamp(min=floor)
        before = space.num_matvecs - max(_STILL, space.num_steps // 10)
        moved = torch.full_like(residual, math.inf)
        for num_matvecs, old in reversed(self.history):
            if num_matvecs <= before:
                moved = (self.values[:k] - old).abs()
                break
        self.history.append((space.num_matvecs, self.values[:k]))
        # In an invariant space the residual is rounding, and nothing moves.
        self.converged = (self.errors <= allowed) & (moved <= allowed) | space.exhausted

    def _restart(self) -> None:
        """Keep the wanted Ritz vectors and half of the others, on the wanted side: they widen the gap."""
        kept = self.k + (self.max_basis - self.k) // 2
        self.space.restart(self.values[:kept], self.coordinates[:, :kept])

    def _keep_run(self) -> None:
        if self.run is None:
            self.run = self.space.run(keep_basis=self.keep_basis, copy=True)
