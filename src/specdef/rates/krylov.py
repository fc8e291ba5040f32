"""The Krylov space of the gradient, and where a method would be in it; the steepest direction. Both fit a memory limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from specdef.curvature.eigenvalues import top_eigenvalues
from specdef.curvature.lanczos import lanczos
from specdef.curvature.linear import SymmetricOperator
from specdef.rates.linear import LinearOptimizer
from specdef.rates.quadratic import share_travelled

# The largest eigenvalue enters the stable rate once: 1 % is plenty, and without a basis 5 %.
_TOL, _LEAN_TOL, _MATVECS, _LEAN_MATVECS = 1e-2, 0.05, 80, 25


@final
class KrylovPath:
    """Lanczos from the gradient, with the displacements that methods make in its space.

    Args:
        operator: The matrix that the method sees.
        start: The gradient `[n]`.
        num_steps: Lanczos steps.
        memory_limit: Bytes for the basis. Where it does not fit, three vectors are kept, and `displacements` repeats the
            recurrence, which costs num_steps more products.
    """

    def __init__(
        self, operator: SymmetricOperator, start: Tensor, num_steps: int, memory_limit: int
    ) -> None:
        self.operator, self.start = operator, start
        fits = (num_steps + 4) * start.numel() * start.element_size() <= memory_limit
        self.run = lanczos(operator, start, num_steps, reorthogonalize=fits, keep_basis=fits)
        self.num_matvecs = self.run.num_matvecs

    def displacements(
        self, optimizer: LinearOptimizer, learning_rate: float, steps: Sequence[int]
    ) -> list[Tensor]:
        """Return where the model says the weights are: -lr |g| Q^T C diag(psi) C^T e_1, psi of each eigenvalue of T.

        Args:
            optimizer: The method.
            learning_rate: Its rate.
            steps: Step numbers.

        Returns:
            One displacement `[n]` for each.
        """
        values, C, _ = self.run.ritz()
        psi = share_travelled(optimizer, learning_rate * values, torch.tensor(list(steps)))
        coordinates = -learning_rate * self.run.start_norm * ((psi * C[0]) @ C.T)
        coordinates = coordinates.to(self.start)
        if self.run.basis is not None:
            return list(coordinates @ self.run.basis)
        found = torch.zeros(len(coordinates), self.start.numel()).to(self.start)
        for j, q in enumerate(self._vectors()):
            found.addr_(coordinates[:, j], q)
        return list(found)

    def _vectors(self) -> Iterator[Tensor]:
        """Make the Lanczos vectors again, by the three-term recurrence with the coefficients that are known."""
        a, b = self.run.diagonal.tolist(), [*self.run.off_diagonal.tolist(), 0.0]
        before, q = torch.zeros_like(self.start), self.start / self.run.start_norm
        for j in range(len(a)):
            yield q
            if j + 1 < len(a):
                product = self.operator @ q
                self.num_matvecs += 1
                before, q = q, (product - a[j] * q - b[j - 1] * before) / b[j]


@dataclass(frozen=True, slots=True, kw_only=True)
class Steepest:
    """The largest eigenvalue, by a random start.

    Args:
        value: The eigenvalue.
        vector: `[n]`; None where it did not fit.
        converged: Whether the value is good to some per cent.
        num_matvecs: Products spent.
    """

    value: float
    vector: Tensor | None
    converged: bool
    num_matvecs: int


def steepest(operator: SymmetricOperator, seed: int, memory_limit: int) -> Steepest:
    """Find the largest eigenvalue.

    Cost: up to 80 products; 25 where a basis does not fit.

    Args:
        operator: The matrix.
        seed: Of the random start.
        memory_limit: Bytes for the basis.

    Returns:
        The eigenvalue.
    """
    n = operator.shape[0]
    vectors = memory_limit // (n * torch.empty((), dtype=operator.dtype).element_size())
    if vectors >= min(n, _MATVECS):
        found = top_eigenvalues(operator, 1, which="LA", tol=_TOL, max_matvecs=_MATVECS, seed=seed)
        assert found.vectors is not None
        return Steepest(
            value=float(found.values[0]),
            vector=found.vectors[0],
            converged=bool(found.converged[0]),
            num_matvecs=found.num_matvecs,
        )
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, generator=generator, dtype=operator.dtype).to(operator.device)
    # Ghost copies of the largest eigenvalue do not change it.
    run = lanczos(operator, start, min(n, _LEAN_MATVECS), reorthogonalize=False, keep_basis=False)
    values, _, residuals = run.ritz()
    return Steepest(
        value=float(values[-1]),
        vector=None,
        converged=float(residuals[-1]) <= _LEAN_TOL * abs(float(values[-1])),
        num_matvecs=run.num_matvecs,
    )


@final
class Shared:
    """What predictions for several optimisers have in common, computed when it is first asked for.

    It belongs to one operator at one point: the caller keeps it no longer than the weights stay as they are.
    """

    def __init__(self) -> None:
        self._paths: dict[tuple[int, int], KrylovPath] = {}
        self._steepest: dict[tuple[int, int], Steepest] = {}

    @property
    def num_matvecs(self) -> int:
        """Products spent on what is here."""
        paths = sum(path.num_matvecs for path in self._paths.values())
        return paths + sum(found.num_matvecs for found in self._steepest.values())

    def path(
        self, operator: SymmetricOperator, start: Tensor, num_steps: int, memory_limit: int
    ) -> KrylovPath:
        """Return the gradient's Krylov space, see `KrylovPath`."""
        key = (num_steps, memory_limit)
        if key not in self._paths:
            self._paths[key] = KrylovPath(operator, start, num_steps, memory_limit)
        return self._paths[key]

    def steepest(self, operator: SymmetricOperator, seed: int, memory_limit: int) -> Steepest:
        """Return the largest eigenvalue, see `steepest`."""
        key = (seed, memory_limit)
        if key not in self._steepest:
            self._steepest[key] = steepest(operator, seed, memory_limit)
        return self._steepest[key]
