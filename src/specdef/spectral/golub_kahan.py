"""Block Golub–Kahan–Lanczos (Golub, Luk & Overton 1981) with full re-orthogonalisation and thick restarts.

Rayleigh–Ritz over the whole Krylov space after each product; restarts after Baglama & Reichel (2005).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from specdef.spectral.power import WIDTH, Operator


class GolubKahan:
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
        op: Operator,
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
        self.padded = WIDTH * math.ceil(k / WIDTH)
        self.max_basis, self.restart = max_basis, restart
        self.U = _Columns(rows, 8 * self.width, start)
        self.V = _Columns(start.shape[0], 8 * self.width, start)
        self.V.append(start)
        # In float64, so that the Gram matrix of B keeps all digits of float32; on the CPU, where small dense problems
        # are faster than on an accelerator.
        self.B = torch.zeros(8 * self.width, 9 * self.width, dtype=torch.float64)
        # First row of U that the newest block of V couples to: all of U after a restart, the last block otherwise.
        self.coupled = 0

    def candidates(self, max_passes: int) -> Iterator[Candidate]:
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
                    yield Candidate(block, side, error <= 0.5)
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


class Candidate(NamedTuple):
    """Ritz vectors (kp >= k columns) whose product with `side` is not exact yet.

    certain: the estimate itself is well below the tolerance, so a measured residual above it is rounding, which no
    iteration will help.
    """

    block: Tensor
    side: int
    certain: bool


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
