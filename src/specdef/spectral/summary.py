"""The ends of a matrix's spectrum: sigma_max, sigma_min, stable rank and condition number, with their residual."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specdef.spectral.iterate import iterate
from specdef.spectral.power import WIDTH, Operator
from specdef.spectral.prepare import check_matrix, full_precision, rescale
from specdef.spectral.topk import solve, topk_svd


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralSummary:
    """The ends of a matrix's spectrum.

    Args:
        sigma_max: Largest singular value, in the units of the matrix.
        sigma_min: The min(m, n)-th singular value; 0 where it is below min(m, n) * eps(float64) * sigma_max; None where
            it was not computed.
        stable_rank: ||A||_F^2 / sigma_max^2, in 1..min(m, n); 0 for the zero matrix.
        condition: sigma_max / sigma_min; infinite where sigma_min is 0; None where that is None.
        residual: Larger of the two residuals, each relative to its own value (of the inverse, for sigma_min); for
            `lapack` the rounding bound min(m, n) * eps(float64).
        method: lapack: all singular values in float64. inverse: sigma_max by `topk_svd`, sigma_min by the same
            iteration on the inverse of the triangular factor, in float64. krylov: sigma_max alone.
    """

    sigma_max: float
    sigma_min: float | None
    stable_rank: float
    condition: float | None
    residual: float
    method: Literal["lapack", "inverse", "krylov"]


def sigma_max(matrix: Tensor, *, tol: float = 1e-5, seed: int = 0) -> tuple[float, float]:
    """Compute the largest singular value and its residual.

    The value is never above the true one but by rounding, and below it by about residual^2 over the relative gap.
    Cost: that of `topk_svd` with k = 1.

    Args:
        matrix: (m, n), floating point, finite.
        tol: Largest residual accepted from the iteration, relative to the value.
        seed: Of the random start.

    Returns:
        The value, in the units of the matrix, and its residual relative to it.

    >>> sigma_max(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))[0]
    5.0
    """
    svd = topk_svd(matrix, 1, tol=tol, seed=seed)
    return float(svd.S[0]), float(svd.residual[0])


def spectral_summary(
    matrix: Tensor,
    *,
    exact_below: int = 1024,
    condition_below: int = 4096,
    tol: float = 1e-5,
    seed: int = 0,
) -> SpectralSummary:
    """Compute sigma_max, sigma_min, stable rank and condition number, as exactly as the size allows.

    With A = Q R (float64), sigma_min(A) = 1 / sigma_max(R^-1): no Gram matrix is formed, so condition numbers up to
    1 / (min(m, n) eps) = 1e12 are resolved. Beyond `condition_below` the factorisation is not affordable, and sigma_min
    and condition are None rather than a guess: products alone do not reach the lower end of a spectrum.

    Cost: 2 max(m, n) min(m, n)^2 flops in float64 for the factor R and (m + n) min(m, n) numbers of 8 bytes, up to
    `condition_below`; that of `topk_svd` with k = 1 above.

    Args:
        matrix: (m, n), floating point, finite.
        exact_below: Largest min(m, n) for which all singular values are computed.
        condition_below: Largest min(m, n) for which sigma_min is computed.
        tol: Largest residual accepted from the iterations.
        seed: Of the random starts.

    Returns:
        The summary, with the method and its residual.

    >>> summary = spectral_summary(torch.diag(torch.tensor([4.0, 2.0, 2.0])))
    >>> round(summary.stable_rank, 6), round(summary.condition, 6), summary.method
    (1.5, 2.0, 'lapack')
    """
    check_matrix(matrix)
    with torch.no_grad(), full_precision(matrix.device):
        weight = matrix.detach()
        side = min(weight.shape)
        A, exponent = rescale(weight if weight.dtype == torch.float64 else weight.float())
        if exponent is None:
            return SpectralSummary(
                sigma_max=0.0,
                sigma_min=0.0,
                stable_rank=0.0,
                condition=math.inf,
                residual=0.0,
                method="lapack",
            )
        rounding = side * torch.finfo(torch.float64).eps
        low: float | None = None
        residual = rounding
        method: Literal["lapack", "inverse", "krylov"] = "lapack"
        if side <= max(exact_below, condition_below):
            tall = A.double() if A.shape[0] >= A.shape[1] else A.double().T
            R = torch.linalg.qr(tall, mode="r")[1]
        if side <= exact_below:
            values = torch.linalg.svdvals(R)
            high, low = float(values[0]), float(values[-1])
        else:
            svd = solve(A, 1, tol, seed, 400).svd
            high, residual, method = float(svd.S[0]), float(svd.residual[0]), "krylov"
            if side <= condition_below:
                found = _smallest(R, tol, seed)
                if found is not None:
                    low, residual, method = found[0], max(residual, found[1]), "inverse"
        if low is not None and low <= rounding * high:
            low = 0.0
        frobenius = float(torch.linalg.vector_norm(A, dtype=torch.float64))
    scale = 2.0**exponent
    return SpectralSummary(
        sigma_max=high * scale,
        sigma_min=None if low is None else low * scale,
        stable_rank=(frobenius / high) ** 2,
        condition=None if low is None else (high / low if low > 0 else math.inf),
        residual=residual,
        method=method,
    )


def stable_rank(matrix: Tensor) -> float:
    """Compute ||A||_F^2 / sigma_max^2; for the residual behind it see `spectral_summary`.

    Args:
        matrix: (m, n), floating point, finite.

    Returns:
        A number in 1..min(m, n); 0 for the zero matrix.

    >>> round(stable_rank(torch.eye(5)), 6)
    5.0
    """
    return spectral_summary(matrix, condition_below=0).stable_rank


def condition_number(matrix: Tensor) -> float | None:
    """Compute sigma_max / sigma_min; for its method and residual see `spectral_summary`.

    Args:
        matrix: (m, n), floating point, finite.

    Returns:
        At least 1; infinite for a singular matrix; None where min(m, n) exceeds 4096.

    >>> condition_number(torch.diag(torch.tensor([8.0, 2.0])))
    4.0
    """
    return spectral_summary(matrix).condition


def _smallest(R: Tensor, tol: float, seed: int) -> tuple[float, float] | None:
    """Return the smallest singular value of an upper triangular float64 matrix and its residual."""
    diagonal = R.diagonal().abs()
    if float(diagonal.min()) <= torch.finfo(R.dtype).eps * float(diagonal.max()):
        return 0.0, 0.0
    op = Operator(
        lambda X: torch.linalg.solve_triangular(R, X, upper=True),
        lambda X: torch.linalg.solve_triangular(R.T, X, upper=False),
    )
    side = len(R)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(side, WIDTH, generator=generator, dtype=R.dtype).to(R.device)
    found = iterate(
        op, start, rows=side, k=1, tol=tol, max_passes=400, basis=max(64, side // 4), restart=True
    )
    return None if found is None else (1 / float(found[1][0]), float(found[3][0]))
