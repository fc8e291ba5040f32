"""Matrices of one shape with a block of singular vectors each, moved on by one product at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specdef.spectral.topk import topk_svd

# Columns beyond k, in which a value that grows from below is found: 8 columns erred hardly less than 4 in training runs.
_EXTRA = 3
# A smaller side up to this, or twice the block, is factorised: that costs no more than a product.
_DENSE_SIDE = 16


class Blocks:
    """Matrices of one shape and dtype, and a block of singular vectors of each, in common tensors.

    left (b, w, m) and right (b, w, n) hold vectors as rows: MKL multiplies a few rows in a third of the time of a few
    columns. The first k of both are the triplets. `side` says which product of a matrix comes next: 0, of the matrix
    with right; 1, of its transpose with left.

    Args:
        tensors: Name to live tensor, (m, n) or (b, m, n).
        k: Triplets per matrix.
        seed: Of computations from scratch.
    """

    TENSORS = ("left", "right", "values")

    def __init__(self, tensors: Mapping[str, Tensor], k: int, seed: int) -> None:
        self.items: list[Tensor] = []
        self.names: list[str] = []
        for name, tensor in tensors.items():
            stacked = tensor.ndim == 3
            self.items += tensor.unbind() if stacked else [tensor]
            self.names += [f"{name}[{i}]" for i in range(len(tensor))] if stacked else [name]
        self.k, self.seed = k, seed
        first, b = self.items[0], len(self.items)
        m, n = first.shape
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.eps = torch.finfo(self.dtype).eps
        self.dense = min(m, n) <= max(_DENSE_SIDE, 2 * (k + _EXTRA))
        self.width = k if self.dense else k + _EXTRA

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=self.dtype, device=first.device)

        self.left, self.right, self.values = (
            zeros(b, self.width, m), zeros(b, self.width, n), zeros(b, k),
        )  # fmt: skip
        # Singular value k + 1, as the last whole block saw it.
        self.beyond = [0.0] * b
        self.side = [0] * b
        self.residuals = [0.0] * b

    def matrix(self, row: int) -> Tensor:
        """Return one matrix in the dtype computed in; the live tensor itself where it has that."""
        return self.items[row].to(self.dtype)

    def factorise(self) -> None:
        """Compute all triplets by a dense factorisation: QR, then the SVD of the small factor in float64."""
        A = torch.stack([self.matrix(row) for row in range(len(self.items))])
        wide = A.shape[1] < A.shape[2]
        Q, R = torch.linalg.qr(A.mT if wide else A)
        core = R.to("cpu", torch.float64)
        everything = [(self, row) for row in range(len(self.items))]
        check_finite(core, everything)
        P, S, Rh = (part.to(A) for part in torch.linalg.svd(core))
        long, short = P[..., : self.k].mT @ Q.mT, Rh[:, : self.k]
        left, right = (short, long) if wide else (long, short)
        self.left.copy_(left), self.right.copy_(right), self.values.copy_(S[:, : self.k])
        check_rank(S, self.k, everything)

    def refresh(self, row: int, tol: float) -> None:
        """Compute one matrix afresh."""
        A = self.matrix(row)
        if not bool(A.isfinite().all()):
            raise ValueError(f"{self.names[row]} is not finite.")
        U, S, Vh, residual = topk_svd(
            A, self.width, tol=max(min(tol, 1e-5), 10 * self.eps), seed=self.seed
        )
        check_rank(S[None], self.k, [(self, row)])
        self.left[row], self.right[row], self.values[row] = U.T, Vh, S[: self.k]
        self.beyond[row] = float(S[self.k])
        self.side[row] = 0
        self.residuals[row] = float(residual[: self.k].max())


def check_rank(S: Tensor, k: int, matrices: Sequence[tuple[Blocks, int]]) -> None:
    """Raise ValueError where fewer than k singular values are above rounding: u v^T is undefined there."""
    floor = torch.tensor([10 * blocks.eps for blocks, _ in matrices], dtype=S.dtype)
    ranks = (S[:, :k].cpu() > floor[:, None] * S[:, :1].cpu()).sum(1)
    if bool((ranks < k).any()):
        bad = int(ranks.argmin())
        blocks, row = matrices[bad]
        raise ValueError(
            f"{blocks.names[row]} has rank {int(ranks[bad])}: the gradient of the sum of its {k} "
            "largest singular values is undefined."
        )


def check_finite(numbers: Tensor, matrices: Sequence[tuple[Blocks, int]]) -> None:
    """Raise ValueError where what was computed of a matrix, and so the matrix, is not finite."""
    finite = numbers.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        blocks, row = matrices[finite.tolist().index(False)]
        raise ValueError(f"{blocks.names[row]} is not finite.")


class Product:
    """One product of some of the matrices of a group, all with the same side.

    Args:
        blocks: The group.
        side: Which product.
        rows: Which matrices.
        whole: Multiply the whole blocks; else the k wanted vectors alone, at a third to a half of the time.
    """

    def __init__(self, blocks: Blocks, side: int, rows: list[int], *, whole: bool) -> None:
        self.blocks, self.side, self.rows, self.whole = blocks, side, rows, whole
        everything = len(rows) == len(blocks.items)
        self.index = slice(None) if everything else torch.tensor(rows, device=blocks.left.device)
        self.source, self.target = (
            (blocks.left, blocks.right) if side else (blocks.right, blocks.left)
        )

    def multiply(self) -> Tensor:
        """Multiply; return per matrix, in float64: the small factor, Rayleigh quotients and residuals of the old pairs."""
        blocks, k = self.blocks, self.blocks.k
        width = blocks.width if self.whole else k
        if self.whole:
            self._orthonormalise()
        out = self.target.new_empty(len(self.rows), width, self.target.shape[2])
        for place, row in enumerate(self.rows):
            A = blocks.matrix(row)
            torch.mm(self.source[row, :width], A if self.side else A.T, out=out[place])
        new, old = out[:, :k], self.target[self.index, :k]
        quotient = (new * old).sum(2)
        gap = torch.linalg.vector_norm(new - quotient[..., None] * old, dim=2)
        self.Q, R = torch.linalg.qr(out.mT)
        core = R.new_zeros(len(R), blocks.width, blocks.width)
        core[:, :width, :width] = R
        return torch.cat([part.flatten(1) for part in (core, quotient, gap)], dim=1).double()

    def rotate(self, P: Tensor, S: Tensor, Rh: Tensor) -> None:
        """Store the Ritz pairs, given the SVD of the small factors."""
        blocks, k = self.blocks, self.blocks.k
        width = self.Q.shape[2]
        for row, beyond in zip(self.rows, S[:, k].tolist(), strict=True):
            blocks.side[row] = 1 - self.side
            if self.whole:
                blocks.beyond[row] = beyond
        P, S, Rh = (part.to(self.Q) for part in (P, S, Rh))
        source = self.source[self.index, :width]
        self.source[self.index, :k] = Rh[:, :k, :width] @ source
        self.target[self.index, :width] = P[:, :width, :width].mT @ self.Q.mT
        blocks.values[self.index] = S[:, :k]

    def _orthonormalise(self) -> None:
        """Make the whole block orthonormal again: products of the k wanted vectors moved these alone."""
        Q, R = torch.linalg.qr(self.source[self.index].mT)
        # Their signs are those of the other side.
        signs = torch.where(R.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
        self.source[self.index] = (Q * signs[:, None].to(Q)).mT
