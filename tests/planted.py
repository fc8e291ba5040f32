"""Shared by the tests of curvature: symmetric matrices with a given spectrum, and Lanczos as the textbook has it."""

from __future__ import annotations

import torch
from torch import Tensor


def planted(values: Tensor, seed: int = 0) -> Tensor:
    """Return a symmetric float64 matrix with the given eigenvalues and Haar eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    A = (Q * values.double()) @ Q.T
    return (A + A.T) / 2


def gaussian(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(n: int, low: float, high: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)


def naive_lanczos(A: Tensor, start: Tensor, num_steps: int) -> tuple[Tensor, Tensor, float]:
    """Transcribe the three-term recurrence, with modified Gram–Schmidt: T, the basis as rows, the last norm."""
    basis = [start / start.norm()]
    T = torch.zeros(num_steps, num_steps, dtype=A.dtype)
    for j in range(num_steps):
        w = A @ basis[j]
        T[j, j] = basis[j] @ w
        for _ in range(3):
            for q in basis:
                w = w - (q @ w) * q
        beta = float(w.norm())
        if j + 1 < num_steps:
            T[j, j + 1] = T[j + 1, j] = beta
            basis.append(w / beta)
    return T, torch.stack(basis), beta
