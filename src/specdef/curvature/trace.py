"""Trace and Frobenius norm of a symmetric operator from products with random signs.

Hutchinson 1990; Hutch++: Meyer, Musco, Musco & Woodruff, arXiv 2010.09649.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specdef.curvature.basis import norm, product, working_dtype
from specdef.curvature.linear import SymmetricOperator
from specdef.spectral.prepare import full_precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A random estimate, free of bias.

    Args:
        value: The estimate.
        standard_error: Of the value, from the spread between probes; NaN where there is one probe only.
        num_matvecs: Products spent.
    """

    value: float
    standard_error: float
    num_matvecs: int


def trace(
    operator: SymmetricOperator,
    num_probes: int = 30,
    *,
    method: Literal["hutchinson", "hutch++"] = "hutchinson",
    seed: int = 0,
) -> Estimate:
    """Estimate the trace of a symmetric operator.

    Hutchinson: the mean of v^T A v over vectors v of random signs, with variance 2 (||A||_F^2 - sum_i A_ii^2) / probes.
    Hutch++: the trace on an orthonormal basis Q of A S, S a third of the probes, tr Q^T A Q, plus Hutchinson on what is
    orthogonal to it, tr (I - Q Q^T) A (I - Q Q^T), with the last third. It gains where few eigenvalues carry the norm, and
    loses a factor of 3 in variance where all are alike.

    Cost: num_probes products. Memory: 4 vectors, and about num_probes more for Hutch++.

    Args:
        operator: A.
        num_probes: Products to spend: at least 1, or 3 for Hutch++.
        method: hutchinson or hutch++.
        seed: Of the signs. Hutch++ draws S first, vector by vector.

    Returns:
        The estimate. The standard error of Hutch++ is that of its last part, given Q.

    Raises:
        ValueError: An argument is out of range.
        SpecDefError: A product is NaN or infinite.

    Example:
        >>> from specdef.curvature.linear import MatrixOperator
        >>> trace(MatrixOperator(torch.diag(torch.tensor([3.0, -1.0]))), 2)
        Estimate(value=2.0, standard_error=0.0, num_matvecs=2)
    """
    if method not in ("hutchinson", "hutch++"):
        raise ValueError(f"method must be hutchinson or hutch++, got {method!r}.")
    if num_probes < (least := 3 if method == "hutch++" else 1):
        raise ValueError(f"num_probes must be at least {least}, got {num_probes}.")
    probes = _Probes(operator, seed)
    with full_precision(operator.device):
        if method == "hutchinson":
            return _estimate([_dot(v, probes.product(v)) for v in probes.draw(num_probes)], 0.0, 0)
        # In n dimensions n vectors span everything.
        sketch = min(num_probes // 3, operator.shape[0])
        Q = torch.linalg.qr(torch.stack([probes.product(v) for v in probes.draw(sketch)], 1))[0]
        inside = sum(_dot(q, probes.product(q)) for q in Q.T)
        rest = []
        for v in probes.draw(num_probes - 2 * sketch):
            v = v - Q @ (Q.T @ v)
            # Q^T v = 0, so that the projection of A v is not needed.
            rest.append(_dot(v, probes.product(v)))
        return _estimate(rest, inside, 2 * sketch)


def frobenius_norm_squared(
    operator: SymmetricOperator, num_probes: int = 30, *, seed: int = 0
) -> Estimate:
    """Estimate ||A||_F^2 = tr A^2, the sum of the squared eigenvalues, by the mean of ||A v||^2.

    Cost: num_probes products and 3 vectors.

    Args:
        operator: A.
        num_probes: Products to spend, at least 1.
        seed: Of the signs.

    Returns:
        The estimate.

    Raises:
        ValueError: An argument is out of range.
        SpecDefError: A product is NaN or infinite.

    Example:
        >>> from specdef.curvature.linear import MatrixOperator
        >>> matrix = torch.diag(torch.tensor([3.0, -1.0]))
        >>> round(frobenius_norm_squared(MatrixOperator(matrix)).value, 4)
        10.0
    """
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, got {num_probes}.")
    probes = _Probes(operator, seed)
    with full_precision(operator.device):
        # Squared in Python's float64: the square of a large norm overflows float32.
        return _estimate([norm(probes.product(v)) ** 2 for v in probes.draw(num_probes)], 0.0, 0)


class _Probes:
    """Vectors of random signs, and products with them, in the working type of an operator."""

    def __init__(self, operator: SymmetricOperator, seed: int) -> None:
        self.operator = operator
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> Iterator[Tensor]:
        """Yield vectors, drawn on the CPU whatever the device: a seed means the same signs everywhere."""
        for _ in range(count):
            bits = torch.randint(2, (self.operator.shape[0],), generator=self.generator)
            yield (2 * bits - 1).to(self.operator.device, working_dtype(self.operator))

    def product(self, v: Tensor) -> Tensor:
        """Return A v."""
        return product(self.operator, v)


def _dot(v: Tensor, w: Tensor) -> float:
    """Return v^T w, summed in float64."""
    return float((v * w).sum(dtype=torch.float64))


def _estimate(samples: list[float], offset: float, spent: int) -> Estimate:
    """Return the mean of samples, each one product, plus what is known exactly."""
    values = torch.tensor(samples, dtype=torch.float64)
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(
        value=offset + float(values.mean()), standard_error=error, num_matvecs=spent + count
    )
