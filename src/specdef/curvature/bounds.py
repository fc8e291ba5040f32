"""Lower bounds on the largest singular value of a product: Lemma A.1, Theorem 2.1 and Remark A.3 of "Locking Open Weight Models with Spectral Deformation".

Everywhere n is the **shared** dimension of a product X Y (X: m x n, Y: n x p), and sigma_n of a matrix with fewer than n
rows or columns is zero. Taking the smallest of the min(n, p) computed singular values instead gives a false bound.

Leading dimensions are a batch whose members all bound the same matrix from below (a sum of positive semidefinite
matrices is at least each of them); the best member is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

RANK_TOLERANCE = 1e-12
"""Singular values below this, relative to the largest, count as zero: Jacobians carry rounding errors of some 1e-14."""

Law = Literal["linear", "quadratic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A lower bound on the largest singular value of a product, or of a Hessian.

    Args:
        name: Short name, for tables.
        equation: What is claimed, in the symbols of its source.
        value: The bound; 0 where it is vacuous.
        vacuous: Why the bound says nothing; empty where it says something.
        factors: The numbers it was made of.
        rigorous: False for a formula that is known to exceed the truth on some matrices.
        law: Power of the singular value of the weight that the equation shows; empty for a bound on a product.
        block: The weight whose Hessian block was bounded.
        through: The weight whose singular values appear in the bound.
    """

    name: str
    equation: str
    value: float
    vacuous: str = ""
    factors: dict[str, float] = field(default_factory=dict)
    rigorous: bool = True
    law: Law | Literal[""] = ""
    block: str = ""
    through: str = ""

    def tightness(self, truth: float) -> float:
        """Return truth / bound: at least 1 where the bound holds, inf where it is vacuous.

        Args:
            truth: The largest singular value that was bounded.

        Returns:
            The ratio.
        """
        return truth / self.value if self.value > 0 else math.inf


def product_bound(X: Float[Tensor, "*b m n"], Y: Float[Tensor, "*b n p"]) -> Bound:
    """Bound a product by Lemma A.1: sigma_1(X Y) >= sigma_1(X) sigma_n(Y).

    Proof: let u, v be the leading pair of X. Then |u^T X Y| = sigma_1(X) |v^T Y| >= sigma_1(X) sigma_n(Y), where
    sigma_n(Y) = min over unit v in R^n of |Y^T v|, which is 0 as soon as Y has fewer than n columns.

    Args:
        X: Left factor.
        Y: Right factor.

    Returns:
        The bound; vacuous where Y has rank below n.

    >>> round(product_bound(torch.eye(2), torch.diag(torch.tensor([3.0, 2.0]))).value, 12)
    2.0
    >>> product_bound(torch.eye(2), torch.tensor([[3.0], [0.0]])).vacuous
    'Y has rank 1 < 2, the shared dimension'
    """
    n = shared_dimension(X, Y)
    S_X, S_Y = singular_values(X), singular_values(Y, n)
    value, at = best(S_X[..., 0] * S_Y[..., n - 1])
    return Bound(
        name="lemma-A.1",
        equation="sigma_1(X Y) >= sigma_1(X) sigma_n(Y)",
        value=value,
        vacuous="" if value > 0 else rank_deficit("Y", S_Y, n) or _ZERO,
        factors={"sigma_1(X)": pick(S_X[..., 0], at), "sigma_n(Y)": pick(S_Y[..., n - 1], at)},
    )


def chain_bound(
    A: Float[Tensor, "*b m p"],
    B: Float[Tensor, "d h"],
    C: Float[Tensor, "*b q n"],
    *,
    copies: int = 1,
) -> Bound:
    """Bound a product of three by Lemma A.1 on both sides: sigma_1(A B C) >= sigma_p(A) sigma_1(B) sigma_q(C).

    This is Theorem 2.1 with everything but B put into "the other factors". It needs A of full column rank and C of full
    row rank; a single ReLU that is off, or an output narrower than what B feeds, makes it vacuous.

    Args:
        A: Left factor, p = copies * d.
        B: Middle factor; the product is A (I_copies (x) B) C.
        C: Right factor, q = copies * h.
        copies: How often B stands on the diagonal.

    Returns:
        The bound; vacuous where A has rank below p or C has rank below q.

    >>> D = torch.diag(torch.tensor([1.0, 2.0]))
    >>> round(chain_bound(D, D, D).value, 12)
    2.0
    """
    p, q = check_chain(A, B, C, copies)
    S_A, S_B, S_C = singular_values(A, p), singular_values(B), singular_values(C, q)
    value, at = best(S_A[..., p - 1] * S_B[0] * S_C[..., q - 1])
    reasons = [rank_deficit("A", S_A, p), rank_deficit("C", S_C, q)]
    return Bound(
        name="theorem-2.1",
        equation="sigma_1(A B C) >= sigma_p(A) sigma_1(B) sigma_q(C)",
        value=value,
        vacuous="" if value > 0 else "; ".join(filter(None, reasons)) or _ZERO,
        factors={
            "sigma_p(A)": pick(S_A[..., p - 1], at),
            "sigma_1(B)": float(S_B[0]),
            "sigma_q(C)": pick(S_C[..., q - 1], at),
        },
    )


def relu_block_bound(
    weight: Float[Tensor, "o h"], slopes: Float[Tensor, "*b h"], x: Float[Tensor, "*b i"]
) -> Bound:
    """Bound the Hessian block of the first layer of a two-layer net, as the proof of Theorem 2.1 does.

    sigma_1(D W^T W D (x) x x^T) >= sigma_1(W) sigma_o(W D) sigma_h(D) |x|^2, with D = diag(slopes). The shared dimension
    of W^T (W D) is o, that of D (W^T W D) is h.

    Args:
        weight: W, the second layer.
        slopes: Derivative of the activation at each hidden unit: 0 or 1 for ReLU.
        x: Input.

    Returns:
        The bound; vacuous as soon as one unit is off (sigma_h(D) = 0), or o > h, or W D has rank below o.

    >>> round(relu_block_bound(torch.tensor([[3.0, 4.0]]), torch.ones(2), torch.tensor([1.0, 1.0])).value, 12)
    50.0
    """
    o = weight.shape[0]
    S_W, S_D = singular_values(weight), slopes.double().abs().amin(-1)
    S_WD = singular_values(weight.double() * slopes.double().unsqueeze(-2), o)
    square = x.double().square().sum(-1)
    value, at = best(S_W[0] * S_WD[..., o - 1] * S_D * square)
    reasons = [
        "" if bool((S_D > 0).any()) else "a unit is off in every sample: sigma_h(D) = 0",
        rank_deficit("W D", S_WD, o),
    ]
    return Bound(
        name="theorem-2.1-relu",
        equation="sigma_1(D W^T W D (x) x x^T) >= sigma_1(W) sigma_o(W D) sigma_h(D) |x|^2",
        value=value,
        vacuous="" if value > 0 else "; ".join(filter(None, reasons)) or _ZERO,
        factors={
            "sigma_1(W)": float(S_W[0]),
            "sigma_o(W D)": pick(S_WD[..., o - 1], at),
            "sigma_h(D)": pick(S_D, at),
            "|x|^2": pick(square, at),
        },
    )


def top_k_bound(X: Float[Tensor, "*b m n"], Y: Float[Tensor, "*b n p"]) -> Bound:
    """Bound a product by Remark A.3: sigma_1(X Y) >= 1/k sum_{i<=k} sigma_i(X) sigma_{n-i+1}(Y), best over k.

    The remark bounds the sum of the k largest singular values (Bhatia); the largest is at least their mean. Where Y has
    rank r < n the first n - r terms are zero: the bound is not, but it does not contain sigma_1(X) any more, and grows
    only if k > n - r singular values of X grow.

    Args:
        X: Left factor.
        Y: Right factor.

    Returns:
        The bound and its `k`; vacuous where rank(X) + rank(Y) <= n.

    >>> round(top_k_bound(torch.diag(torch.tensor([4.0, 2.0])), torch.diag(torch.tensor([3.0, 0.0]))).value, 12)
    3.0
    """
    n = shared_dimension(X, Y)
    S_X, S_Y = singular_values(X, n), singular_values(Y, n)
    k = torch.arange(1, n + 1, dtype=torch.float64, device=S_X.device)
    value, at = best((S_X * S_Y.flip(-1)).cumsum(-1) / k)
    return Bound(
        name="remark-A.3",
        equation="sigma_1(X Y) >= 1/k sum_{i<=k} sigma_i(X) sigma_{n-i+1}(Y)",
        value=value,
        vacuous="" if value > 0 else _too_little_rank(S_X, S_Y, n),
        factors={"k": float(at % n + 1)},
    )


def rank_bound(X: Float[Tensor, "*b m n"], Y: Float[Tensor, "*b n p"]) -> Bound:
    """Bound a product by its best single pair: sigma_1(X Y) >= max_i sigma_i(X) sigma_{n-i+1}(Y).

    Never below Remark A.3, since a mean is at most its largest term. Proof: the right singular vectors of X up to i span i
    dimensions, the left ones of Y up to n - i + 1 span n - i + 1; they share a unit vector w. |X w| >= sigma_i(X), and
    w = Y y with |y| <= 1 / sigma_{n-i+1}(Y).

    Args:
        X: Left factor.
        Y: Right factor.

    Returns:
        The bound and its `i`; vacuous where rank(X) + rank(Y) <= n.

    >>> round(rank_bound(torch.diag(torch.tensor([4.0, 2.0])), torch.diag(torch.tensor([3.0, 0.0]))).value, 12)
    6.0
    """
    n = shared_dimension(X, Y)
    S_X, S_Y = singular_values(X, n), singular_values(Y, n)
    value, at = best(S_X * S_Y.flip(-1))
    return Bound(
        name="rank",
        equation="sigma_1(X Y) >= max_i sigma_i(X) sigma_{n-i+1}(Y)",
        value=value,
        vacuous="" if value > 0 else _too_little_rank(S_X, S_Y, n),
        factors={"i": float(at % n + 1)},
    )


_ZERO = "no member of the batch has every factor of full rank"


def singular_values(X: Float[Tensor, "*b m n"], n: int | None = None) -> Float[Tensor, "*b k"]:
    """Return singular values in float64, descending, zero below `RANK_TOLERANCE`, filled up with zeros to n.

    Args:
        X: Matrix, or a batch.
        n: How many to return; min(m, n) unless told.

    Returns:
        The values. Setting small ones to zero lowers a lower bound, so that it stays one.
    """
    S = torch.linalg.svdvals(X.double())
    S = torch.where(RANK_TOLERANCE * S[..., :1] < S, S, 0.0)
    return S if n is None else torch.nn.functional.pad(S, (0, max(0, n - S.shape[-1])))[..., :n]


def shared_dimension(X: Tensor, Y: Tensor) -> int:
    """Return n of X (m x n) times Y (n x p)."""
    if X.shape[-1] != Y.shape[-2]:
        raise ValueError(f"X Y needs matching shapes, got {list(X.shape)} and {list(Y.shape)}.")
    return X.shape[-1]


def check_chain(A: Tensor, B: Tensor, C: Tensor, copies: int) -> tuple[int, int]:
    """Return the shared dimensions (p, q) of A (I_copies (x) B) C."""
    p, q = copies * B.shape[0], copies * B.shape[1]
    if A.shape[-1] != p or C.shape[-2] != q:
        raise ValueError(
            f"A (I_{copies} (x) B) C needs matching shapes, got {list(A.shape)}, {list(B.shape)} and {list(C.shape)}."
        )
    return p, q


def repeated(B: Tensor, copies: int) -> Tensor:
    """Return I_copies (x) B."""
    # Not torch.kron: it fails on a single column of a transposed matrix (torch 2.13).
    eye = torch.eye(copies, dtype=B.dtype, device=B.device)
    return torch.einsum("ab,ij->aibj", eye, B).flatten(2).flatten(0, 1)


def best(values: Tensor) -> tuple[float, int]:
    """Return the largest value and its flat index."""
    at = int(values.argmax())
    return float(values.reshape(-1)[at]), at


def pick(values: Tensor, at: int) -> float:
    """Return the value at a flat index."""
    return float(values.reshape(-1)[at])


def rank_deficit(name: str, S: Tensor, n: int) -> str:
    """Say that no member of a batch has rank n; empty where one has."""
    rank = int((S > 0).sum(-1).max())
    return f"{name} has rank {rank} < {n}, the shared dimension" if rank < n else ""


def _too_little_rank(S_X: Tensor, S_Y: Tensor, n: int) -> str:
    ranks = [int((S > 0).sum(-1).max()) for S in (S_X, S_Y)]
    return f"rank(X) + rank(Y) = {ranks[0]} + {ranks[1]} <= {n}, the shared dimension"
