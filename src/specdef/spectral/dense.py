"""The leading singular triplets by one dense factorisation, measured; the CPU decides where a device fails."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from specdef.errors import NotConverged
from specdef.spectral.power import Triplets

DenseMethod = Literal["gram", "lapack"]


def dense(A: Tensor, k: int) -> tuple[Triplets, DenseMethod]:
    """Factorise without iteration: Gram and eigh in float64 for float32, LAPACK's SVD for float64 or if eigh fails.

    A Gram matrix of float32 entries in float64 is exact to 1e-16 sigma_1^2, so every sigma is exact to 1e-8 sigma_1,
    below the rounding of float32, at a fifth of the time of an SVD (1024 x 4096). Where the device's solver does not
    converge (cuSOLVER) or its residual is unusable, the CPU decides.

    Returns:
        The triplets with the smallest residual found, and the routine that gave them.
    """
    usable = 100 * torch.finfo(A.dtype).eps
    best: tuple[Triplets, DenseMethod] | None = None
    methods: tuple[DenseMethod, ...] = ("gram", "lapack")
    if A.dtype == torch.float64:
        methods = ("lapack",)
    for device in dict.fromkeys((A.device, torch.device("cpu"))):
        for method in methods:
            try:
                U, S, V = (_gram if method == "gram" else _lapack)(A.to(device), k)
            except RuntimeError:  # LinAlgError, or the device is out of memory
                continue
            U, S, V = (part.to(A.device, A.dtype) for part in (U, S, V))
            residual = _measure(A, U, S, V)
            if best is None or not residual.max() >= best[0][-1].max():
                best = (U, S, V, residual), method
            if residual.max() <= usable:
                return best
    if best is None:
        raise NotConverged(f"no dense factorisation of the {tuple(A.shape)} matrix converged")
    return best


def _measure(A: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Return the residuals (k,) relative to S[0] from two products with the matrix."""
    left = torch.linalg.vector_norm((V.T @ A.T).T - U * S, dim=0)
    right = torch.linalg.vector_norm((U.T @ A).T - V * S, dim=0)
    return torch.maximum(left, right) / S[0]


def _gram(A: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    if A.shape[0] > A.shape[1]:
        V, S, U = _gram(A.T, k)
        return U, S, V
    A64 = A.double()
    P = torch.linalg.eigh(A64 @ A64.T)[1][:, -k:]
    # S from A^T P, not from the eigenvalues: these carry the squared condition number.
    V, R = torch.linalg.qr(A64.T @ P)
    left, S, right = torch.linalg.svd(R)
    return P @ right.T, S, V @ left


def _lapack(A: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].T
