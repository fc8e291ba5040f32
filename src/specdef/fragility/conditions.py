"""The three conditions under which alignment is said to be unstable, each with its number, its baseline and its margin.

The Alignment Instability Condition of arXiv 2602.15799; the baselines and quantiles are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
from scipy.special import betaincinv  # type: ignore[import-untyped]

from specdef.fragility.subspace import FisherSubspace

_QUANTILE, _DRAWS = 0.975, 20_000


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One condition and how clearly it holds.

    Args:
        name: "low-rank sensitivity", "initial orthogonality" or "curvature coupling".
        holds: Whether it holds.
        value: The number it speaks of.
        threshold: What the number is held against.
        baseline: What a random subspace or direction would give; None where there is none.
        margin: How far it is on the side where it holds: above 1 it holds. Infinite where nothing is against it.
        statement: One sentence with the numbers.
    """

    name: str
    holds: bool
    value: float
    threshold: float
    baseline: float | None
    margin: float
    statement: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values; the report turns what is not finite into null."""
        return asdict(self)


def low_rank(subspace: FisherSubspace) -> Condition:
    """Judge low-rank sensitivity: few directions carry the Fisher matrix, and the last of them is there.

    Args:
        subspace: The sensitive subspace.

    Returns:
        The condition; its value is the share of the trace outside.
    """
    tail, allowed = 1 - subspace.energy, 1 - subspace.energy_wanted
    last, error = float(subspace.values[-1]), float(subspace.errors[-1])
    # energy = 1 asks for everything: what rounding leaves outside is nothing.
    holds = tail <= max(allowed, 1e-6) and last > error
    return Condition(
        name="low-rank sensitivity",
        holds=holds,
        value=tail,
        threshold=allowed,
        baseline=None,
        margin=_ratio(max(allowed, 1e-6), tail),
        statement=f"{subspace.rank} directions carry {subspace.energy:.1%} of the Fisher matrix "
        f"({subspace.energy_wanted:.0%} asked for); the last eigenvalue is {last:.3g}, known to {error:.1g}.",
    )


def initial_orthogonality(
    overlap: float, quantile: float, random: float, rank: int, n: int, quartic_over_quadratic: float
) -> Condition:
    """Judge initial orthogonality: the task's gradient hardly points into the subspace.

    Args:
        overlap: |Pi g| / |g|.
        quantile: 97.5 % of random subspaces have less.
        random: Their root mean square.
        rank: d.
        n: Number of weights.
        quartic_over_quadratic: Quartic over quadratic term at the planned steps.

    Returns:
        The condition. It holds where the overlap is no more than that of random subspaces. A larger one may still be without
        weight at the planned steps, which the ratio of the two terms tells.
    """
    return Condition(
        name="initial orthogonality",
        holds=overlap <= quantile,
        value=overlap,
        threshold=quantile,
        baseline=random,
        margin=_ratio(quantile, overlap),
        statement=f"The gradient's overlap with the subspace is {overlap:.3g}; random subspaces of dimension {rank} in {n} "
        f"have {random:.3g}, and 97.5 % of them less than {quantile:.3g}. At the planned steps the quartic term is "
        f"{quartic_over_quadratic:.3g} times the quadratic one.",
    )


def curvature_coupling(gamma: float, quantile: float, random: float) -> Condition:
    """Judge curvature coupling: the task's curvature bends the path into the subspace.

    Args:
        gamma: |F^(1/2) Pi H g|.
        quantile: 97.5 % of random directions of the length of H g have less.
        random: Their root mean square.

    Returns:
        The condition.
    """
    return Condition(
        name="curvature coupling",
        holds=gamma > quantile,
        value=gamma,
        threshold=quantile,
        baseline=random,
        margin=_ratio(gamma, quantile),
        statement=f"gamma is {gamma:.3g}; random directions of the same length have {random:.3g}, and 97.5 % of them less "
        f"than {quantile:.3g}.",
    )


def overlap_quantile(rank: int, n: int) -> float:
    """Return what 97.5 % of random subspaces overlap less than: |Pi u|^2 ~ Beta(d / 2, (n - d) / 2).

    Args:
        rank: d, 1..n.
        n: Dimension.

    Returns:
        A quantile of |Pi u|, u a unit vector; 1 for d = n.

    >>> round(overlap_quantile(8, 10_000), 4)
    0.0419
    """
    return 1.0 if rank >= n else math.sqrt(float(betaincinv(rank / 2, (n - rank) / 2, _QUANTILE)))


def coupling_quantile(values: Sequence[float], n: int, length: float, seed: int) -> float:
    """Return what 97.5 % of random directions have a smaller gamma than, by simulation.

    gamma^2 = |v|^2 sum_j lambda_j u_j^2 for a direction u uniform on the sphere.

    Args:
        values: lambda_j.
        n: Dimension.
        length: |v|.
        seed: Of the draws.

    Returns:
        The quantile of gamma, to about 1 %.
    """
    rng = np.random.default_rng(seed)
    squares = rng.chisquare(1, (_DRAWS, len(values)))
    others = rng.chisquare(n - len(values), _DRAWS) if n > len(values) else 0.0
    gammas = np.sqrt(squares @ np.asarray(values) / (squares.sum(1) + others))
    return length * float(np.quantile(gammas, _QUANTILE))


def _ratio(value: float, other: float) -> float:
    return value / other if other > 0 else math.inf
