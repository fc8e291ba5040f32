"""Symmetric matrices known by their products with vectors: what every routine of the spectrum takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor


class SymmetricOperator(ABC):
    """A real symmetric n x n matrix A, known by A v.

    Args:
        n: Number of rows.
        dtype: Floating type of the vectors it takes and gives.
        device: Where they live.
    """

    def __init__(self, n: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self._n, self.dtype, self.device = n, dtype, torch.device(device)
        self._num_matvecs = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self._n, self._n)

    @property
    def num_matvecs(self) -> int:
        """Products with a vector made so far."""
        return self._num_matvecs

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return A v.

        Args:
            v: `[n]`, or `[n, k]` for k products; it is cast to the operator's type and device.

        Returns:
            A tensor of the same shape.

        Raises:
            ValueError: The first dimension is not n, or v is complex.
        """
        if v.ndim not in (1, 2) or v.shape[0] != self._n:
            raise ValueError(f"v must be [{self._n}] or [{self._n}, k], got {list(v.shape)}.")
        if v.is_complex():
            raise ValueError("v must be real, got a complex tensor.")
        v = v.detach().to(self.device, self.dtype)
        if v.ndim == 2:
            return torch.stack([self @ column for column in v.T], 1) if v.shape[1] else v.clone()
        self._num_matvecs += 1
        return self._matvec(v)

    @abstractmethod
    def _matvec(self, v: Tensor) -> Tensor:
        """Return A v for one vector `[n]` of the right type and device."""

    def to_dense(self) -> Tensor:
        """Return the matrix `[n, n]` by n products: for small n."""
        return self @ torch.eye(self._n, dtype=self.dtype, device=self.device)


@final
class MatrixOperator(SymmetricOperator):
    """A symmetric matrix that is at hand.

    Args:
        matrix: `[n, n]`, floating; only symmetric matrices make sense, and none is checked here.

    Example:
        >>> MatrixOperator(torch.diag(torch.tensor([3.0, 1.0]))) @ torch.ones(2)
        tensor([3., 1.])
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        self.matrix = matrix

    def _matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v


@final
class ScaledOperator(SymmetricOperator):
    """D A D for a diagonal D: with D = P^(-1/2), the matrix whose spectrum a method preconditioned by P sees.

    Args:
        operator: A.
        diagonal: `[n]`, the diagonal of D.
    """

    def __init__(self, operator: SymmetricOperator, diagonal: Tensor) -> None:
        super().__init__(operator.shape[0], dtype=operator.dtype, device=operator.device)
        self.operator = operator
        self.diagonal = diagonal.to(operator.device, operator.dtype)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.diagonal * (self.operator @ (self.diagonal * v))


@final
class DeflatedOperator(SymmetricOperator):
    """(I - Q Q^T) A (I - Q Q^T): A without the directions in Q.

    Args:
        operator: A.
        basis: Q^T `[k, n]`, orthonormal rows.
    """

    def __init__(self, operator: SymmetricOperator, basis: Tensor) -> None:
        super().__init__(operator.shape[0], dtype=operator.dtype, device=operator.device)
        self.operator, self.basis = operator, basis.to(operator.device, operator.dtype)

    def project(self, v: Tensor) -> Tensor:
        """Return (I - Q Q^T) v."""
        return v - self.basis.T @ (self.basis @ v)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.project(self.operator @ self.project(v))
