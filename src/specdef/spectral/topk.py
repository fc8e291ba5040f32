"""The k largest singular triplets of a weight matrix, each with a measured residual.

Block Golub–Kahan–Lanczos (Golub, Luk & Overton 1981) with full re-orthogonalisation, Rayleigh–Ritz over the whole
Krylov space and thick restarts (Baglama & Reichel 2005). A weight matrix at initialisation has its top singular values
at the edge of a dense bulk: subspace iteration needs hundreds of passes there, a Krylov space a few dozen (Musco & Musco
2015, arXiv 1504.05477). Where a dense factorisation is cheaper, or the iteration runs out of budget, a dense
factorisation gives the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from specdef.errors import NotConverged

Method = Literal["krylov", "gram", "lapack", "zero"]
"""krylov: block Golub–Kahan–Lanczos. gram: eigh of the Gram matrix in float64 (float32 input only, where squaring costs
no digit of the input). lapack: torch.linalg.svd. zero: the matrix is zero."""

# A product with 16 columns costs 4 times one with a single column (float32 4096 x 4096, one core: 13.5 ms and 3.3 ms),
# and saves more than 4 times the steps at the edge of a bulk.
_WIDTH = 16
# Extra columns. A block narrower than k would find a singular value repeated k times once per column only; the columns
# beyond k widen the gap that the last triplets converge at.
_OVERSAMPLE = 4
# Below this smaller side the dense route wins at any spectrum (7 ms at 256).
_DENSE_SIDE = 256
# Columns of either basis before a thick restart: bounds memory by 1024 (m + n) numbers.
_MAX_BASIS = 1024
# Norms outside this range are rescaled by a power of two (exact), so that no square over- or underflows in float32.
_SAFE = (2.0**-20, 2.0**40)


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
    _check_matrix(matrix)
    side = min(matrix.shape)
    if not 1 <= k <= side:
        raise ValueError(f"k must be in 1..min(m, n) = {side}, got {k}.")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}.")
    if max_passes < 1:
        raise ValueError(f"max_passes must be at least 1, got {max_passes}.")
    with torch.no_grad(), _full_precision(matrix.device):
        info = _solve(matrix.detach(), k, tol, seed, max_passes)
    if strict and not info.converged:
        raise NotConverged(
            f"topk_svd: residual {float(info.svd.residual.max()):.1e} exceeds tol {tol:.1e}",
            result=info,
            hint=f"Raise tol above the rounding floor {info.floor:.0e}, or pass a float64 matrix.",
        )
    return info


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
    _check_matrix(matrix)
    with torch.no_grad(), _full_precision(matrix.device):
        weight = matrix.detach()
        side = min(weight.shape)
        A, exponent = _rescale(weight if weight.dtype == torch.float64 else weight.float())
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
            svd = _solve(A, 1, tol, seed, 400).svd
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


def _smallest(R: Tensor, tol: float, seed: int) -> tuple[float, float] | None:
    """Return the smallest singular value of an upper triangular float64 matrix and its residual."""
    diagonal = R.diagonal().abs()
    if float(diagonal.min()) <= torch.finfo(R.dtype).eps * float(diagonal.max()):
        return 0.0, 0.0
    op = _Operator(
        lambda X: torch.linalg.solve_triangular(R, X, upper=True),
        lambda X: torch.linalg.solve_triangular(R.T, X, upper=False),
    )
    side = len(R)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(side, _WIDTH, generator=generator, dtype=R.dtype).to(R.device)
    found = _iterate(
        op, start, rows=side, k=1, tol=tol, max_passes=400, basis=max(64, side // 4), restart=True
    )
    return None if found is None else (1 / float(found[1][0]), float(found[3][0]))


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


def _check_matrix(matrix: Tensor) -> None:
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"matrix must be 2-D and not empty, got shape {tuple(matrix.shape)}.")
    if not matrix.is_floating_point():
        raise ValueError(f"matrix must be floating point, got {matrix.dtype}.")


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast and TF32 / bfloat16 products: a residual measured with them would be noise at 1e-3."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def _solve(matrix: Tensor, k: int, tol: float, seed: int, max_passes: int) -> TopKInfo:
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    # Rounding of one product and of the combination of basis vectors: a small multiple of eps, measured 2 to 6.
    floor = 10 * torch.finfo(dtype).eps
    A, exponent = _rescale(matrix.to(dtype))
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
        svd, method = _dense(A, k)
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


def _rescale(A: Tensor) -> tuple[Tensor, int | None]:
    """Return A / 2^e and e, with a norm no square of which over- or underflows; e is None for the zero matrix."""
    norm = float(torch.linalg.vector_norm(A))
    if _SAFE[0] <= norm <= _SAFE[1]:
        return A, 0
    # The norm itself may have overflowed or vanished: only the entries tell.
    low, high = A.aminmax()
    peak = max(-float(low), float(high))
    if not math.isfinite(peak):
        raise ValueError("matrix must be finite, got NaN or infinity.")
    if peak == 0.0:
        return A, None
    exponent = math.frexp(peak)[1]
    # Two factors: 2^-e alone overflows float32 when the entries are subnormal.
    half = exponent // 2
    return A * 2.0**-half * 2.0 ** -(exponent - half), exponent


def _krylov(
    A: Tensor, k: int, tol: float, seed: int, max_passes: int
) -> tuple[TopKSVD | None, int, int]:
    """Return triplets that meet `tol` (None: take the dense route), passes and matvecs spent."""
    m, n = A.shape
    side = min(m, n)
    width = _WIDTH * math.ceil((k + _OVERSAMPLE) / _WIDTH)
    if side <= _DENSE_SIDE or 12 * width > side:
        return None, 0, 0
    # Up to 1024 the dense route costs no more than the steps past a third of the side (0.2 s); beyond, restarts win.
    restart = side > 1024
    generator = torch.Generator().manual_seed(seed)
    # On the CPU whatever the device, so that a seed means the same start everywhere.
    start = torch.randn(side, width, generator=generator, dtype=A.dtype).to(A.device)
    tall = A if m >= n else A.T
    # Thin operand first: A.T @ X costs up to twice (X.T @ A).T in MKL at 16 columns, and ten times at 8.
    op = _Operator(lambda X: (X.T @ tall.T).T, lambda X: (X.T @ tall).T)
    basis = max(4 * width, min(_MAX_BASIS, side // 2)) if restart else side // 3
    found = _iterate(
        op, start, rows=max(m, n), k=k, tol=tol, max_passes=max_passes, basis=basis, restart=restart
    )
    if found is None:
        return None, op.num_passes, op.num_matvecs
    left, S, right, residual = found
    U, V = (left, right) if m >= n else (right, left)
    svd = TopKSVD(U.contiguous(), S, V.T.contiguous(), residual)
    return svd, op.num_passes, op.num_matvecs


class _Operator:
    """Products with a matrix (side 0) and its transpose (side 1), counted."""

    def __init__(
        self, matmat: Callable[[Tensor], Tensor], rmatmat: Callable[[Tensor], Tensor]
    ) -> None:
        self.sides = (matmat, rmatmat)
        self.num_passes = 0
        self.num_matvecs = 0

    def __call__(self, side: int, block: Tensor) -> Tensor:
        self.num_passes += 1
        self.num_matvecs += block.shape[1]
        return self.sides[side](block)


_Triplets = tuple[Tensor, Tensor, Tensor, Tensor]
"""U (m, k), S (k,), V (n, k), residual (k,)."""


def _iterate(
    op: _Operator,
    start: Tensor,
    *,
    rows: int,
    k: int,
    tol: float,
    max_passes: int,
    basis: int,
    restart: bool,
) -> _Triplets | None:
    """Power steps while they converge fast, then the Krylov space of the block they leave; None if out of budget."""
    power = _Power(op, torch.linalg.qr(start)[0], side=0, k=k)
    # Before any measurement a residual is of order one.
    before = 1 / tol
    while op.num_passes < max_passes:
        power.step(ritz=op.num_passes > 0)
        if power.measured is None:
            continue
        error = power.error / tol
        # A fast decay inside the block is what makes power steps safe: on a flat spectrum with one value slightly above
        # it their residual is small long before they have found that value.
        decays = bool(power.S[-1] <= 0.7 * power.S[k - 1])
        if error <= 1 and decays:
            return power.triplets()
        rate, before = error / before, error
        # If the pair just formed should pass, measure it with few columns rather than with a whole step.
        if decays and error * rate <= 0.3 and 2 * k <= start.shape[1]:
            power.measure()
            if power.error <= tol:
                return power.triplets()
        # From here a Krylov space takes five products at least and dearer ones: not worth it where six power steps do.
        soon = decays and rate < 1 and math.log(max(error, 1.0)) <= -6 * math.log(max(rate, 1e-9))
        if op.num_passes >= 3 and power.side == 0 and not soon:
            break
    krylov = _GolubKahan(op, power.block, rows=rows, k=k, tol=tol, max_basis=basis, restart=restart)
    for candidate in krylov.candidates(max_passes):
        # The first product moves one side half a step further and the second measures: both sides are then known from
        # products with the matrix itself.
        polish = _Power(op, candidate.block, side=candidate.side, k=k)
        polish.step()
        polish.measure()
        if polish.error <= tol:
            return polish.triplets()
        if candidate.certain:
            return None
    return None


class _Power:
    """Block power iteration with Rayleigh–Ritz after every product, each product measuring the pair before it.

    Invariant after a step: `block` (the newest side) and `other` are orthonormal and one product is exact,
    op(other) = block diag(S); the next product, of `block`, is what measures the pair.

    Args:
        op: The operator.
        block: Orthonormal block to start from.
        side: Which product comes next: 0 for A, 1 for A^T.
        k: Triplets wanted, at most the width of the block.
    """

    def __init__(self, op: _Operator, block: Tensor, *, side: int, k: int) -> None:
        self.op, self.block, self.side, self.k = op, block, side, k
        self.other: Tensor | None = None
        self.S = block.new_ones(block.shape[1])
        self.error = math.inf
        self.exact = block.new_zeros(k)
        self.measured: _Triplets | None = None

    def step(self, *, ritz: bool = True) -> None:
        """Multiply the block, which measures its pair, and form the next pair (`ritz`) or block."""
        product = self.op(self.side, self.block)
        self._record(product)
        Q, R = torch.linalg.qr(product)
        self.side = 1 - self.side
        if not ritz:
            self.block = Q
            return
        left, S, right = (part.to(R) for part in torch.linalg.svd(R.to("cpu", torch.float64)))
        self.other, self.block, self.S = self.block @ right.T, Q @ left, S
        gap = product @ right.T[:, : self.k] - self.block[:, : self.k] * S[: self.k]
        self.exact = torch.linalg.vector_norm(gap, dim=0)

    def measure(self) -> None:
        """Measure the newest pair with a product of as few columns as are cheaper than sixteen."""
        columns = self.k if 2 * self.k <= _WIDTH else self.block.shape[1]
        self._record(self.op(self.side, self.block[:, :columns]))

    def _record(self, product: Tensor) -> None:
        if self.other is None:
            return
        k, S = self.k, self.S
        gap = product[:, :k] - self.other[:, :k] * S[:k]
        residual = torch.maximum(torch.linalg.vector_norm(gap, dim=0), self.exact) / S[0]
        pair = (self.block[:, :k], self.other[:, :k])
        V, U = pair if self.side == 0 else pair[::-1]
        self.measured = (U, S[:k], V, residual)
        self.error = float(residual.max())

    def triplets(self) -> _Triplets:
        """Return the pair measured last."""
        assert self.measured is not None
        return self.measured


def _measure(A: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Return the residuals (k,) relative to S[0] from two products with the matrix."""
    left = torch.linalg.vector_norm((V.T @ A.T).T - U * S, dim=0)
    right = torch.linalg.vector_norm((U.T @ A).T - V * S, dim=0)
    return torch.maximum(left, right) / S[0]


def _dense(A: Tensor, k: int) -> tuple[TopKSVD, Method]:
    """Factorise without iteration: Gram and eigh in float64 for float32, LAPACK's SVD for float64 or if eigh fails.

    A Gram matrix of float32 entries in float64 is exact to 1e-16 sigma_1^2, so every sigma is exact to 1e-8 sigma_1,
    below the rounding of float32, at a fifth of the time of an SVD (1024 x 4096). Where the device's solver does not
    converge (cuSOLVER) or its residual is unusable, the CPU decides.

    Returns:
        The triplets with the smallest residual found, and the routine that gave them.
    """
    usable = 100 * torch.finfo(A.dtype).eps
    best: tuple[TopKSVD, Method] | None = None
    methods: tuple[Method, ...] = ("lapack",) if A.dtype == torch.float64 else ("gram", "lapack")
    for device in dict.fromkeys((A.device, torch.device("cpu"))):
        for method in methods:
            try:
                U, S, V = (_gram if method == "gram" else _lapack)(A.to(device), k)
            except RuntimeError:  # LinAlgError, or the device is out of memory
                continue
            U, S, V = (part.to(A.device, A.dtype) for part in (U, S, V))
            svd = TopKSVD(U, S, V.T.contiguous(), _measure(A, U, S, V))
            if best is None or not svd.residual.max() >= best[0].residual.max():
                best = svd, method
            if svd.residual.max() <= usable:
                return best
    if best is None:
        raise NotConverged(f"no dense factorisation of the {tuple(A.shape)} matrix converged")
    return best


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


class _Columns:
    """Columns of an orthonormal basis, stored as rows of a buffer that doubles: no memory before it is needed."""

    def __init__(self, size: int, capacity: int, like: Tensor) -> None:
        self.rows = torch.empty(capacity, size, dtype=like.dtype, device=like.device)
        self.count = 0

    def append(self, block: Tensor) -> None:
        end = self.count + block.shape[1]
        if end > len(self.rows):
            grown = self.rows.new_empty(max(end, 2 * len(self.rows)), self.rows.shape[1])
            grown[: self.count] = self.rows[: self.count]
            self.rows = grown
        self.rows[self.count : end] = block.T
        self.count = end

    def replace(self, columns: Tensor) -> None:
        self.count = 0
        self.append(columns)

    def __getitem__(self, where: slice) -> Tensor:
        return self.rows[: self.count][where].T


class _Candidate(NamedTuple):
    """Ritz vectors (kp >= k columns) whose product with `side` is not exact yet.

    certain: the estimate itself is well below the tolerance, so a measured residual above it is rounding, which no
    iteration will help.
    """

    block: Tensor
    side: int
    certain: bool


class _GolubKahan:
    """Block Golub–Kahan–Lanczos with thick restarts for an m x n operator, m >= n.

    Invariant, to rounding: U and V have orthonormal columns and B = U^T A V. After a product with A, A V = U B; after a
    product with A^T, A^T U = V B^T. The block a product has just added to B is therefore the residual of the smaller
    projected problem without it.

    Differs from Baglama & Reichel's irlba in: blocks; checks after single products, not pairs; the pair returned
    comes from the larger projected problem, half a step ahead of its estimate, and is measured by the caller.

    Args:
        op: The operator.
        start: Orthonormal block (n, b), b > k; gives dtype and device.
        rows: m.
        k: Triplets wanted.
        tol: Residual wanted, relative to S[0].
        max_basis: Columns of a basis that call for a restart.
        restart: Whether to restart there or give up.
    """

    def __init__(
        self,
        op: _Operator,
        start: Tensor,
        *,
        rows: int,
        k: int,
        tol: float,
        max_basis: int,
        restart: bool,
    ) -> None:
        self.op = op
        self.k, self.tol, self.width = k, tol, start.shape[1]
        # Sixteen columns cost a product no more than two do.
        self.padded = _WIDTH * math.ceil(k / _WIDTH)
        self.max_basis, self.restart = max_basis, restart
        self.U = _Columns(rows, 8 * self.width, start)
        self.V = _Columns(start.shape[0], 8 * self.width, start)
        self.V.append(start)
        # In float64, so that the Gram matrix of B keeps all digits of float32; on the CPU, where small dense problems
        # are faster than on an accelerator.
        self.B = torch.zeros(8 * self.width, 9 * self.width, dtype=torch.float64)
        # First row of U that the newest block of V couples to: all of U after a restart, the last block otherwise.
        self.coupled = 0

    def candidates(self, max_passes: int) -> Iterator[_Candidate]:
        """Yield Ritz vectors whenever, once polished, they should meet the tolerance; asking for more goes on."""
        eps = torch.finfo(self.V.rows.dtype).eps
        step, check_at = 0, 2
        before: tuple[int, float] | None = None
        while self.op.num_passes < max_passes:
            coupling = self._extend_left() if step % 2 == 0 else self._extend_right()
            step += 1
            B = self.B[: self.U.count, : self.V.count]
            # A vanishing coupling means an invariant subspace: waiting adds nothing.
            vanished = step > 1 and coupling <= 10 * eps * float(torch.linalg.matrix_norm(B))
            full = step % 2 == 0 and self.V.count + self.width > self.max_basis
            if step < check_at and not full and not vanished:
                continue
            estimate, S = self._estimate()
            error, gain = estimate / self.tol, 1.0
            if before is not None and error < before[1]:
                gain = (error / before[1]) ** (1 / (step - before[0]))
            # The larger projected problem is half a step ahead of the estimate, which gains as the last steps did;
            # polishing is half a step of subspace iteration.
            polish = min(1.0, float(S[-1] / S[self.k - 1])) if len(S) > self.padded else 1.0
            if vanished or (step > 2 and error * gain * polish <= 0.7):
                P, S_next, Y = self._ritz(B, self.padded)
                # A singular value that the start nearly missed shows as a jump between the nested problems.
                if float((S_next[: self.k] - S[: self.k]).abs().max()) <= self.tol * float(S[0]):
                    # After a product with A, A V = U S is exact and A^T U comes next; and vice versa.
                    side = step % 2
                    block = self.U[:] @ P.to(self.U.rows) if side else self.V[:] @ Y.to(self.V.rows)
                    yield _Candidate(block, side, error <= 0.5)
            # Convergence is close to geometric: skip most of the predicted steps, as a check costs O(p^3).
            wait = step / 4
            if gain < 1.0 < error:
                wait = 0.7 * math.log(error) / -math.log(max(gain, 1e-3))
            check_at = step + max(1, min(math.ceil(wait), step // 3))
            before = step, error
            if full:
                if not self.restart:
                    return
                self._restart()
                check_at, before = step + 2, None

    def _extend_left(self) -> float:
        """Multiply the newest block of V by A; return the norm of the coupling to the new block of U."""
        b, pu, pv = self.width, self.U.count, self.V.count
        W = self.op(0, self.V[pv - b :])
        self._reserve(pu + b, pv)
        new, H, R = _orthogonalise(
            W, self.U[:], self.coupled, self.B[self.coupled : pu, pv - b : pv]
        )
        self.U.append(new)
        self.B[:pu, pv - b : pv] += H
        self.B[pu : pu + b, pv - b : pv] = R
        return float(torch.linalg.matrix_norm(R))

    def _extend_right(self) -> float:
        """Multiply the newest block of U by A^T; return the norm of the coupling to the new block of V."""
        b, pu, pv = self.width, self.U.count, self.V.count
        Z = self.op(1, self.U[pu - b :])
        self._reserve(pu, pv + b)
        new, H, C = _orthogonalise(Z, self.V[:], pv - b, self.B[pu - b : pu, pv - b : pv].T)
        self.V.append(new)
        self.B[pu - b : pu, :pv] += H.T
        self.B[pu - b : pu, pv : pv + b] = C.T
        self.coupled = pu - b
        return float(torch.linalg.matrix_norm(C))

    def _reserve(self, rows: int, columns: int) -> None:
        if rows > self.B.shape[0] or columns > self.B.shape[1]:
            grown = self.B.new_zeros(2 * max(rows, columns), 2 * max(rows, columns))
            grown[: self.B.shape[0], : self.B.shape[1]] = self.B
            self.B = grown

    def _estimate(self) -> tuple[float, Tensor]:
        """Return the largest residual, relative to S[0], and the leading S of the problem without the newest block."""
        M = self.B[: self.U.count, : self.V.count]
        if self.U.count >= self.V.count:
            M = M.T
        kept, coupling = M[:, : -self.width], M[:, -self.width :]
        P, S = self._left(kept, self.padded + 1)
        residual = torch.linalg.vector_norm(coupling.T @ P[:, : self.k], dim=0)
        return float(residual.max() / S[0].clamp_min(torch.finfo(S.dtype).tiny)), S

    def _left(self, M: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the `count` largest left singular vectors and values of a projected matrix."""
        if self.V.rows.dtype == torch.float64:
            P, S, _ = torch.linalg.svd(M, full_matrices=False)
            return P[:, :count], S[:count]
        squares, P = torch.linalg.eigh(M @ M.T)
        return P.flip(1)[:, :count], squares.flip(0)[:count].clamp_min(0).sqrt()

    def _ritz(self, M: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        P, _ = self._left(M, min(count, *M.shape))
        Y, R = torch.linalg.qr(M.T @ P)
        left, S, right = torch.linalg.svd(R)
        return P @ right.T, S, Y @ left

    def _restart(self) -> None:
        """Keep the leading third as Ritz vectors; the newest block of V couples to all of them."""
        b, pu = self.width, self.U.count
        dtype, device = self.V.rows.dtype, self.V.rows.device
        B = self.B[:pu, : self.V.count]
        keep = max(self.k, self.max_basis // 3 // b * b)
        P, S, Y = self._ritz(B[:, :-b], keep)
        newest = self.V[self.V.count - b :].clone()
        self.U.replace(self.U[:] @ P.to(device, dtype))
        self.V.replace(self.V[: self.V.count - b] @ Y.to(device, dtype))
        self.V.append(newest)
        coupling = P.T @ B[:, -b:]
        self.B = torch.zeros_like(self.B)
        self.B[:keep, :keep] = torch.diag(S)
        self.B[:keep, keep : keep + b] = coupling
        self.coupled = 0


def _orthogonalise(
    Z: Tensor, Q: Tensor, known_from: int, known: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return N, H, R with Z = Q[:, known_from:] known + Q H + N R, N orthonormal and orthogonal to Q.

    The recurrence removes what is known; one full pass on the normalised rest then removes what rounding left, and is
    repeated where the rest was itself rounding ("twice is enough").
    """
    H = torch.zeros(Q.shape[1], Z.shape[1], dtype=torch.float64)
    if known.numel():
        Z = torch.addmm(Z, Q[:, known_from:], known.to(Z.device, Z.dtype), alpha=-1)
    N, R = torch.linalg.qr(Z)
    for _ in range(3):
        D = Q.T @ N
        N = torch.addmm(N, Q, D, alpha=-1)
        H += (D @ R).to("cpu", torch.float64)
        # Nearly orthonormal unless a column was mostly rounding: Cholesky QR is then safe, and cheaper.
        L, info = torch.linalg.cholesky_ex(N.T @ N)
        if int(info) == 0 and float(L.diagonal().min()) > 0.7:
            eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
            N = N @ torch.linalg.solve_triangular(L, eye, upper=False).T
            return N, H, (L.T @ R).to("cpu", torch.float64)
        N, T = torch.linalg.qr(N)
        R = T @ R
    return N, H, R.to("cpu", torch.float64)
