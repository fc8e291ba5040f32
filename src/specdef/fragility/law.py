"""The quartic law: alignment loss within the sensitive subspace, from the first two orders of the path.

Gradient flow is phi(t) = -t g + t^2 / 2 H g + O(t^3). With 1/2 phi^T F phi on the subspace M, F there U^T diag(lambda) U,

    A_M(t) = 1/2 (t^2 a - t^3 b + t^4 / 4 gamma^2),
    a = |F^(1/2) Pi g|^2,   b = <F^(1/2) Pi g, F^(1/2) Pi H g>,   gamma = |F^(1/2) Pi H g|,

so gamma^2 t^4 / 8 where Pi g = 0. arXiv 2602.15799 writes Omega(lambda gamma^2 t^4); with F^(1/2) inside gamma, lambda
is in it already, and the constant is 1/8.

This is the paper's law, with F held: the outputs' second derivative adds a term of the same order, see `acceleration`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from specdef.fragility.path import QuadraticPath
from specdef.fragility.subspace import FisherSubspace


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class QuarticLaw:
    """The coefficients of the law.

    Args:
        a: |F^(1/2) Pi g|^2.
        b: <F^(1/2) Pi g, F^(1/2) Pi H g>.
        gamma: |F^(1/2) Pi H g|.
        overlap: |Pi g| / |g|.
        coupling_norm: |H g|.
    """

    a: float
    b: float
    gamma: float
    overlap: float
    coupling_norm: float

    @classmethod
    def of(cls, subspace: FisherSubspace, path: QuadraticPath) -> QuarticLaw:
        """Return the law of a path and a subspace in the same coordinates."""
        W = within(subspace, path)
        Hg = path.coupling()
        first, second = path.gradient_norm * W[:, 0], W @ Hg
        return cls(
            a=float(subspace.values @ first**2),
            b=float(subspace.values @ (first * second)),
            gamma=math.sqrt(float(subspace.values @ second**2)),
            overlap=float(W[:, 0].norm()),
            coupling_norm=float(Hg.norm()),
        )

    def alignment(self, t: Tensor, half_square: Tensor) -> Tensor:
        """Return A_M.

        Args:
            t: `[s]`, time.
            half_square: `[s]`, t^2 / 2; a method in steps has its own, see `clocks`.

        Returns:
            `[s]`.
        """
        return (t**2 * self.a - 2 * t * half_square * self.b + half_square**2 * self.gamma**2) / 2

    def onset(self) -> float:
        """Return the time from which the quartic term is the larger: 2 sqrt(a) / gamma; inf without coupling."""
        return 2 * math.sqrt(self.a) / self.gamma if self.gamma > 0 else math.inf


def within(subspace: FisherSubspace, path: QuadraticPath) -> Tensor:
    """Return U Q^T `[d, m]` float64: the path's basis in the subspace."""
    return (subspace.vectors @ path.basis.T).double().cpu()
