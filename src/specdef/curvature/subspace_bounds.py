"""Bounds on sigma_1(A B C) by the angles between singular subspaces: what a reading note says of arXiv 2602.18868, and what holds.

The note: sigma_1(A B C) >= sup_{r1,r2} sigma_r1(A) sigma_1(B) sigma_r2(C) cos t1 cos t2. With t1, t2 the angles of B's
leading vectors u_1, v_1 to the top right singular subspace of A and the top left one of C, this is false: for
A = z z^T, C = y y^T with z = (1, 1)/sqrt 2, y = (1, -1)/sqrt 2 and B = diag(1 + e, 1) the product is (e/2) z y^T, but the
formula gives (1 + e)/2. `abc_noted` keeps it for comparison; the other three are theorems with short proofs below.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from specdef.curvature.bounds import RANK_TOLERANCE, Bound, best, check_chain, pick, repeated

# Singular values of B closer than this, relative to the largest, count as equal: their vectors are any basis of one space.
_EQUAL = 1e-12


def abc_noted(
    A: Float[Tensor, "*b m p"], B: Float[Tensor, "d h"], C: Float[Tensor, "*b q n"]
) -> Bound:
    """Evaluate the formula as the note has it: **not a bound** (`rigorous` is False).

    sup_{r1,r2} sigma_r1(A) sigma_1(B) sigma_r2(C) cos t1 cos t2, with t1 the angle of u_1(B) to the top-r1 right singular
    subspace of A and t2 that of v_1(B) to the top-r2 left singular subspace of C.

    Args:
        A: Left factor.
        B: Middle factor.
        C: Right factor.

    Returns:
        The value, which can exceed sigma_1(A B C) by any factor.

    >>> z, y = torch.tensor([1.0, 1.0]) / 2**0.5, torch.tensor([1.0, -1.0]) / 2**0.5
    >>> A, B, C = torch.outer(z, z), torch.diag(torch.tensor([1.001, 1.0])), torch.outer(y, y)
    >>> round(abc_noted(A, B, C).value, 4), round(float(torch.linalg.matrix_norm(A @ B @ C, 2)), 4)
    (0.5005, 0.0005)
    """
    check_chain(A, B, C, 1)
    top = _leading(B)
    if top.U.shape[1] > 1:
        return Bound(
            name="abc-noted",
            equation=_NOTED,
            value=0.0,
            vacuous="sigma_1(B) is repeated: u_1(B) is not unique",
            rigorous=False,
        )
    left, right = _svd(A.mT), _svd(C)
    first = (left.S * _cosines(left.U, top.U[:, 0])).amax(-1)
    second = (right.S * _cosines(right.U, top.V[:, 0])).amax(-1)
    value, _ = best(first * top.sigma * second)
    return Bound(
        name="abc-noted",
        equation=_NOTED,
        value=value,
        vacuous="" if value > 0 else _NO_OVERLAP,
        rigorous=False,
        factors={"sigma_1(B)": top.sigma},
    )


def abc_sequential(
    A: Float[Tensor, "*b m p"],
    B: Float[Tensor, "d h"],
    C: Float[Tensor, "*b q n"],
    *,
    copies: int = 1,
) -> Bound:
    """Bound by the noted formula with the angles taken one product after the other.

    sigma_1(A B C) >= sup sigma_r1(A) sigma_1(B) sigma_r2(C) cos t1 cos t2, with t2 the angle of v_1(B) to the top-r2 left
    singular subspace of C, and t1 that of u_1(**B C**) to the top-r1 right singular subspace of A. Proof: with X = B C,
    sigma_1(A X) >= sigma_1(X) |A u_1(X)| >= sigma_1(X) sigma_r1(A) cos t1, and
    sigma_1(X) >= |u_1(B)^T B C| = sigma_1(B) |v_1(B)^T C| >= sigma_1(B) sigma_r2(C) cos t2. From the other end (u_1(B) to A,
    v_1(A B) to C) likewise; the larger is taken. Where sigma_1(B) is repeated, v_1(B) is the best for C in its space.

    Args:
        A: Left factor, p = copies * d.
        B: Middle factor; the product is A (I_copies (x) B) C.
        C: Right factor, q = copies * h.
        copies: How often B stands on the diagonal.

    Returns:
        The bound. It needs no rank, and is vacuous only where a leading vector misses the other factor altogether.

    >>> D = torch.diag(torch.tensor([2.0, 0.0]))
    >>> round(abc_sequential(D, D, D).value, 12)
    8.0
    """
    check_chain(A, B, C, copies)
    left, right = _svd(A.mT), _svd(C)
    forward = _sequential(left, B, C, right, copies)
    backward = _sequential(right, B.mT, A.mT, left, copies)
    value, at = best(torch.maximum(forward[0], backward[0]))
    first, second = (forward if pick(forward[0], at) == value else backward)[1:]
    return Bound(
        name="abc-sequential",
        equation=_NOTED + ", t1 to u_1(B C)",
        value=value,
        vacuous="" if value > 0 else _NO_OVERLAP,
        factors={
            "sigma_1(B)": _leading(B).sigma,
            "sigma_r1 cos t1": pick(first, at),
            "sigma_r2 cos t2": pick(second, at),
        },
    )


def abc_subspace(
    A: Float[Tensor, "*b m p"],
    B: Float[Tensor, "d h"],
    C: Float[Tensor, "*b q n"],
    *,
    copies: int = 1,
) -> Bound:
    """Bound by what B does between the top subspaces: sigma_1(A B C) >= sup_{r1,r2} sigma_r1(A) sigma_r2(C) sigma_1(Z^T B Y).

    Z: orthonormal basis of the top-r1 right singular subspace of A; Y: of the top-r2 left singular subspace of C. Proof:
    with the matching left vectors U of A and right vectors V of C, U^T A B C V = S_A (Z^T B Y) S_C, where the diagonal S_A
    and S_C are at least sigma_r1(A) and sigma_r2(C); U and V have norm 1. Ranks are tried at powers of two and at full.

    Args:
        A: Left factor, p = copies * d.
        B: Middle factor; the product is A (I_copies (x) B) C.
        C: Right factor, q = copies * h.
        copies: How often B stands on the diagonal.

    Returns:
        The bound and its `r1`, `r2`.

    >>> D = torch.diag(torch.tensor([2.0, 1.0]))
    >>> round(abc_subspace(D, torch.tensor([[0.0, 0.0], [0.0, 5.0]]), D).value, 12)
    5.0
    """
    check_chain(A, B, C, copies)
    left, right = _svd(A.mT), _svd(C)
    M = left.U.mT @ _apply(B.double(), right.U, copies)
    found = (0.0, 0, 0)
    for r1 in _ranks(left.S):
        for r2 in _ranks(right.S):
            part = M[..., :r1, :r2]
            # The smaller Gram matrix: squaring costs nothing at the top of the spectrum.
            gram = part @ part.mT if r1 <= r2 else part.mT @ part
            norm = torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0).sqrt()
            value, _ = best(left.S[..., r1 - 1] * right.S[..., r2 - 1] * norm)
            found = max(found, (value, r1, r2))
    value, r1, r2 = found
    return Bound(
        name="abc-subspace",
        equation="sigma_1(A B C) >= sigma_r1(A) sigma_r2(C) sigma_1(Z^T B Y)",
        value=value,
        vacuous="" if value > 0 else _NO_OVERLAP,
        factors={"r1": float(r1), "r2": float(r2)},
    )


def abc_gap(
    A: Float[Tensor, "*b m p"],
    B: Float[Tensor, "d h"],
    C: Float[Tensor, "*b q n"],
    *,
    copies: int = 1,
) -> Bound:
    """Bound by the noted formula less what the rest of B can take away, a closed form of `abc_subspace`.

    sigma_1(A B C) >= sup sigma_r1(A) sigma_r2(C) max(0, sigma_1(B) cos t1 cos t2 - sigma_2(B) sin t1 sin t2), angles as in
    `abc_noted`. Proof: let z in Z be the unit vector nearest to u_1(B), y in Y that nearest to v_1(B). Then
    z = cos t1 u_1 + sin t1 w with w orthogonal to u_1, and z^T B y differs from sigma_1(B) cos t1 cos t2 by at most
    sigma_2(B) sin t1 sin t2. It tends to the noted formula as sigma_1/sigma_2 grows. Where sigma_1(B) is repeated m times
    (U, V: its vectors), z and y are the leading pair of (Z^T U)(V^T Y), the cosines' product is its singular value, and sigma_2
    is sigma_{m+1}.

    Args:
        A: Left factor, p = copies * d.
        B: Middle factor; the product is A (I_copies (x) B) C.
        C: Right factor, q = copies * h.
        copies: How often B stands on the diagonal.

    Returns:
        The bound and its `r1`, `r2`.

    >>> D = torch.diag(torch.tensor([2.0, 1.0]))
    >>> round(abc_gap(D, D, D).value, 12)
    8.0
    """
    check_chain(A, B, C, copies)
    left, right, top = _svd(A.mT), _svd(C), _leading(B)
    P = left.U.mT @ repeated(top.U, copies)
    Q = right.U.mT @ repeated(top.V, copies)
    found = (0.0, 0, 0)
    for r1 in _ranks(left.S):
        for r2 in _ranks(right.S):
            Z, Y = P[..., :r1, :], Q[..., :r2, :]
            z, G, yh = torch.linalg.svd(Z @ Y.mT, full_matrices=False)
            cos1 = (z[..., :1].mT @ Z).norm(dim=(-2, -1))
            cos2 = (yh[..., :1, :] @ Y).norm(dim=(-2, -1))
            sines = ((1 - cos1.square()).clamp_min(0) * (1 - cos2.square()).clamp_min(0)).sqrt()
            inner = (top.sigma * G[..., 0] - top.next * sines).clamp_min(0)
            value, _ = best(left.S[..., r1 - 1] * right.S[..., r2 - 1] * inner)
            found = max(found, (value, r1, r2))
    value, r1, r2 = found
    return Bound(
        name="abc-gap",
        equation="sigma_1(A B C) >= sigma_r1(A) sigma_r2(C) (sigma_1(B) cos t1 cos t2 - sigma_2(B) sin t1 sin t2)",
        value=value,
        vacuous="" if value > 0 else "sigma_2(B) sin t1 sin t2 outweighs sigma_1(B) cos t1 cos t2",
        factors={
            "r1": float(r1),
            "r2": float(r2),
            "sigma_1(B)": top.sigma,
            "sigma_2(B)": top.next,
        },
    )


_NOTED = "sigma_1(A B C) >= sigma_r1(A) sigma_1(B) sigma_r2(C) cos t1 cos t2"
_NO_OVERLAP = "the leading subspaces of the factors are orthogonal"


class _Left(NamedTuple):
    U: Tensor
    S: Tensor


class _Leading(NamedTuple):
    U: Tensor
    V: Tensor
    sigma: float
    next: float


def _svd(X: Tensor) -> _Left:
    """Left singular vectors and singular values, zero below rank tolerance."""
    U, S, _ = torch.linalg.svd(X.double(), full_matrices=False)
    return _Left(U, torch.where(RANK_TOLERANCE * S[..., :1] < S, S, 0.0))


def _leading(B: Tensor) -> _Leading:
    """Singular vectors of all singular values equal to the largest, that value, and the next one."""
    U, S, Vh = torch.linalg.svd(B.double(), full_matrices=False)
    m = int(((1 - _EQUAL) * S[0] <= S).sum())
    return _Leading(U[:, :m], Vh[:m].T, float(S[m - 1]), float(S[m]) if m < len(S) else 0.0)


def _sequential(
    left: _Left, B: Tensor, C: Tensor, right: _Left, copies: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The bound from the right end, and its two halves; left is the SVD of A^T, right that of C."""
    top = _leading(B)
    V = repeated(top.V, copies)
    # Any unit vector of the space serves as v_1(B); this one makes |v_1^T C| largest.
    v = (V @ torch.linalg.svd(V.mT @ C.double(), full_matrices=False)[0][..., :1]).squeeze(-1)
    second = (right.S * _cosines(right.U, v)).amax(-1)
    u = _svd(_apply(B.double(), C.double(), copies)).U[..., 0]
    first = (left.S * _cosines(left.U, u)).amax(-1)
    return first * top.sigma * second, first, second


def _cosines(basis: Tensor, v: Tensor) -> Tensor:
    """Cosine of the angle between v and the span of the first r columns, for r = 1, 2, …."""
    return (basis.mT @ v.unsqueeze(-1)).squeeze(-1).square().cumsum(-1).clamp_max(1).sqrt()


def _apply(B: Tensor, X: Tensor, copies: int) -> Tensor:
    """Return (I_copies (x) B) X."""
    blocks = X.reshape(*X.shape[:-2], copies, -1, X.shape[-1])
    return (B @ blocks).flatten(-3, -2)


def _ranks(S: Tensor) -> list[int]:
    """Powers of two below the rank, and the rank."""
    rank = int((S > 0).sum(-1).max())
    return sorted({2**i for i in range(rank.bit_length()) if 2**i < rank} | ({rank} - {0}))
