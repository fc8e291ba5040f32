"""The k largest singular triplets of a weight matrix, each with a measured residual.

Block Golub–Kahan–Lanczos (Golub, Luk & Overton 1981) with full re-orthogonalisation, Rayleigh–Ritz over the whole
Krylov space and thick restarts (Baglama & Reichel 2005). A weight matrix at initialisation has its top singular values
at the edge of a dense bulk: subspace iteration needs hundreds of passes there, a Krylov space a few dozen (Musco & Musco
2015, arXiv 1504.05477). Where a dense factorisation is cheaper, or the iteration runs out of budget, a dense
factorisation gives the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from specdef.errors import NotConverged
from specdef.spectral.dense import dense
from specdef.spectral.iterate import iterate
from specdef.spectral.power import WIDTH, Operator
from specdef.spectral.prepare import check_matrix, full_precision, rescale

Method = Literal["krylov", "gram", "lapack", "zero"]
"""krylov: block Golub–Kahan–Lanczos. gram: eigh of the Gram matrix in float64 (float32 input only, where squaring costs
no digit of the input). lapack: torch.linalg.svd. zero: the matrix is zero."""

# Extra columns. A block narrower than k would find a singular value repeated k times once per column only; the columns
# beyond k widen the gap that the last triplets converge at.
_OVERSAMPLE = 4
# Below this smaller side the dense route wins at any spectrum (7 ms at 256).
_DENSE_SIDE = 256
# Columns of either basis before a thick restart: bounds memory by 1024 (m + n) numbers.
_MAX_BASIS = 1024


class TopKSVD(NamedTuple):
    """The k largest singular triplets, `matrix ~ U @ diag(S) @ Vh`; unpacks as `(U, S, Vh, residual)`.

    Args:
        U: Left singular vectors (m, k), orthonormal columns.
        S: Singular values (k,), descending, in the units of the matrix.
        Vh: Right singular vectors (k, n), orthonormal rows.
        residual: (k,), max(||A v - s u||, ||A^T u - s v||) / S[0], from products with the matrix itself. Some
            singular value lies within residual[i] * S[0] of S[i].
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residual: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKInfo:
    """A `TopKSVD` and how it was computed.

    Args:
        svd: The triplets.
        method: Which routine gave them.
        num_matvecs: Products of the matrix or its transpose with one vector; 0 matvecs are counted for a dense
            factorisation itself.
        num_passes: Products with a block of vectors, each of which reads the matrix once.
        converged: Whether every residual is at most `tol`.
        tol: The tolerance asked for, relative to S[0].
        floor: Rounding level of a residual in the working dtype, relative to S[0]; a `tol` below it cannot be met.
    """

    svd: TopKSVD
    method: Method
    num_matvecs: int
    num_passes: int
    converged: bool
    tol: float
    floor: float


def topk_svd(
    matrix: Tensor,
    k: int,
    *,
    tol: float = 1e-5,
    seed: int = 0,
    max_passes: int = 400,
    strict: bool = False,
) -> TopKSVD:
    """Compute the k largest singular triplets of a matrix.

    A v_i = s_i u_i and A^T u_i = s_i v_i for i = 1..k, up to `residual[i] * S[0]`. The residual bounds the distance from
    S[i] to a singular value; where S[i] is separated from the others by a gap g (relative to S[0]), its error is about
    residual^2 / g and the angle of the vectors about residual / g: inside a cluster narrower than the residual the
    vectors are some orthonormal basis of the cluster.

    float64 is computed in float64; float32, bfloat16 and float16 in float32, which is also the dtype of the answer.
    TF32, reduced-precision float32 products and autocast are switched off inside. No gradient is recorded.

    Cost: 7 to 17 passes over the matrix (products with 16 columns for k <= 12) for spectra that decay like i^-1 to i^-0.5
    and 55 to 65 for a Gaussian 4096 x 4096 matrix; at most 1024 (m + n) numbers besides the matrix. Smaller sides up to
    256, or k above about a twelfth of the smaller side, take one dense factorisation, of a float64 copy.

    Args:
        matrix: (m, n), floating point, finite.
        k: How many triplets, 1..min(m, n).
        tol: Largest residual accepted from the iteration, relative to S[0].
        seed: Of the random start; same seed, same machine, same answer.
        max_passes: Budget of products with a block; past it a dense factorisation is taken.
        strict: Raise when a residual exceeds `tol` in the end (then `tol` is below what the dtype allows).

    Returns:
        `(U, S, Vh, residual)` with shapes (m, k), (k,), (k, n), (k,).

    Raises:
        ValueError: If `matrix` is not a finite floating-point matrix, or `k`, `tol` or `max_passes` is out of range.
        NotConverged: If `strict` and a residual exceeds `tol`; `.result` is the `TopKInfo`.

    >>> U, S, Vh, residual = topk_svd(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    >>> [round(s, 5) for s in S.tolist()], bool(residual.max() < 1e-6)
    ([3.0, 2.0], True)
    """
    return topk_svd_info(matrix, k, tol=tol, seed=seed, max_passes=max_passes, strict=strict).svd


def topk_svd_info(
    matrix: Tensor,
    k: int,
    *,
    tol: float = 1e-5,
    seed: int = 0,
    max_passes: int = 400,
    strict: bool = False,
) -> TopKInfo:
    """Compute the k largest singular triplets and say how: method, products spent, convergence, rounding floor.

    Args:
        matrix: (m, n), floating point, finite.
        k: How many triplets, 1..min(m, n).
        tol: Largest residual accepted from the iteration, relative to S[0].
        seed: Of the random start.
        max_passes: Budget of products with a block.
        strict: Raise when a residual exceeds `tol` in the end.

    Returns:
        The triplets with their provenance; see `topk_svd` for the mathematics.

    Raises:
        NotConverged: If `strict` and a residual exceeds `tol`; `.result` is the `TopKInfo`.

    >>> topk_svd_info(torch.eye(3), 1).method
    'gram'
    """
    check_matrix(matrix)
    side = min(matrix.shape)
    if not 1 <= k <= side:
        raise ValueError(f"k must be in 1..min(m, n) = {side}, got {k}.")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}.")
    if max_passes < 1:
        raise ValueError(f"max_passes must be at least 1, got {max_passes}.")
    with torch.no_grad(), full_precision(matrix.device):
        info = solve(matrix.detach(), k, tol, seed, max_passes)
    if strict and not info.converged:
        raise NotConverged(
            f"topk_svd: residual {float(info.svd.residual.max()):.1e} exceeds tol {tol:.1e}",
            result=info,
            hint=f"Raise tol above the rounding floor {info.floor:.0e}, or pass a float64 matrix.",
        )
    return info


def solve(matrix: Tensor, k: int, tol: float, seed: int, max_passes: int) -> TopKInfo:
    """Compute what `topk_svd_info` returns, of arguments already checked, inside `full_precision`."""
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    # Rounding of one product and of the combination of basis vectors: a small multiple of eps, measured 2 to 6.
    floor = 10 * torch.finfo(dtype).eps
    A, exponent = rescale(matrix.to(dtype))
    m, n = A.shape
    if exponent is None:
        eye = torch.eye(max(m, n), k, dtype=dtype, device=A.device)
        zero = torch.zeros(k, dtype=dtype, device=A.device)
        svd = TopKSVD(eye[:m].clone(), zero, eye[:n].T.contiguous(), zero.clone())
        return TopKInfo(
            svd=svd,
            method="zero",
            num_matvecs=0,
            num_passes=0,
            converged=True,
            tol=tol,
            floor=floor,
        )
    found, passes, matvecs = _krylov(A, k, tol, seed, max_passes)
    method: Method = "krylov"
    if found is not None:
        svd = found
    else:
        (U, S, V, residual), method = dense(A, k)
        svd = TopKSVD(U, S, V.T.contiguous(), residual)
        passes, matvecs = passes + 2, matvecs + 2 * k
    # In float64: 2^e alone may overflow float32.
    svd = svd._replace(S=(svd.S.double() * 2.0**exponent).to(dtype))
    return TopKInfo(
        svd=svd,
        method=method,
        num_matvecs=matvecs,
        num_passes=passes,
        converged=float(svd.residual.max()) <= tol,
        tol=tol,
        floor=floor,
    )


def _krylov(
    A: Tensor, k: int, tol: float, seed: int, max_passes: int
) -> tuple[TopKSVD | None, int, int]:
    """Return triplets that meet `tol` (None: take the dense route), passes and matvecs spent."""
    m, n = A.shape
    side = min(m, n)
    width = WIDTH * math.ceil((k + _OVERSAMPLE) / WIDTH)
    if side <= _DENSE_SIDE or 12 * width > side:
        return None, 0, 0
    # Up to 1024 the dense route costs no more than the steps past a third of the side (0.2 s); beyond, restarts win.
    restart = side > 1024
    generator = torch.Generator().manual_seed(seed)
    # On the CPU whatever the device, so that a seed means the same start everywhere.
    start = torch.randn(side, width, generator=generator, dtype=A.dtype).to(A.device)
    tall = A if m >= n else A.T
    # Thin operand first: A.T @ X costs up to twice (X.T @ A).T in MKL at 16 columns, and ten times at 8.
    op = Operator(lambda X: (X.T @ tall.T).T, lambda X: (X.T @ tall).T)
    basis = max(4 * width, min(_MAX_BASIS, side // 2)) if restart else side // 3
    found = iterate(
        op, start, rows=max(m, n), k=k, tol=tol, max_passes=max_passes, basis=basis, restart=restart
    )
    if found is None:
        return None, op.num_passes, op.num_matvecs
    left, S, right, residual = found
    U, V = (left, right) if m >= n else (right, left)
    svd = TopKSVD(U.contiguous(), S, V.T.contiguous(), residual)
    return svd, op.num_passes, op.num_matvecs
