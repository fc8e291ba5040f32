"""The density of a symmetric operator's eigenvalues, by stochastic Lanczos quadrature.

Lin, Saad & Yang 2016; Ubaru, Chen & Saad 2017; for Hessians Ghorbani, Krishnan & Xiao, arXiv 1901.10159. Outliers can be
deflated: they become points of mass 1/n, and the quadrature describes the bulk alone, which may be 1e-8 of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdef.curvature.basis import gaussian_vectors, norm
from specdef.curvature.eigenvalues import Eigenvalues
from specdef.curvature.lanczos import LanczosRun, lanczos
from specdef.curvature.linear import DeflatedOperator, SymmetricOperator

_POINTS = 1001  # of a grid that is not given; a smoothing width is then about ten of its steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A function of the eigenvalue on a grid, averaged over probes.

    Args:
        grid: `[g]` float64, eigenvalues, ascending.
        position: `[g]` float64, where they lie on the axis that `value` is a density of: the eigenvalue itself, or its
            `signed_log`.
        value: `[g]` float64, a density per unit of `position`, or a fraction of all eigenvalues.
        standard_error: `[g]` float64, of `value`, from the spread between probes; NaN for a single probe. The smoothing
            and the limited resolution of a rule of m nodes are not in it.
    """

    grid: Tensor
    position: Tensor
    value: Tensor
    standard_error: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralDensity:
    """The fraction of eigenvalues around every value, as point masses: one quadrature rule for each probe.

    Args:
        nodes: For each probe the nodes `[m]`, float64, ascending.
        weights: For each probe the weights `[m]`, with sum 1.
        deflated: `[k]` float64, eigenvalues that are not in the rules: mass 1/n each, the rules share the rest.
        n: Number of eigenvalues.
        floor: Rounding level of a product, 10 eps |A|: smaller eigenvalues cannot be told from zero.
        num_matvecs: Products spent here; those of shared runs not included.
    """

    nodes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    deflated: Tensor
    n: int
    floor: float
    num_matvecs: int

    def moment(self, power: int) -> tuple[float, float]:
        """Return the mean of the eigenvalues' power, tr A^power / n, and its standard error.

        It is free of bias for powers up to twice the number of steps minus 1.
        """
        value, error = self._mean(lambda x: x[None] ** power)
        return float(value), float(error)

    def cumulative(self, grid: Tensor) -> Curve:
        """Return the fraction of eigenvalues up to each point of an ascending grid `[g]`.

        In one rule of m nodes it is known to the weight of the nearest node. Deflation shifts it by less than k / n, even
        where the vectors are inexact (Cauchy interlacing).
        """
        grid = grid.to("cpu", torch.float64)
        value, error = self._mean(lambda x: (x <= grid[:, None]).double())
        return Curve(grid=grid, position=grid, value=value, standard_error=error)

    def quantile(self, fraction: float) -> float:
        """Return the smallest node, or deflated value, that at least this fraction of the eigenvalues lies at or below."""
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be in 0..1, got {fraction}.")
        values, masses = self._points()
        values, order = values.sort()
        reached = masses[order].cumsum(0)
        # Rounding of the sum must not carry the fraction 1 past the last node.
        index = int(torch.searchsorted(reached, fraction * float(reached[-1])))
        return float(values[min(index, len(values) - 1)])

    def density(self, grid: Tensor | None = None, *, sigma: float | None = None) -> Curve:
        """Return the density per unit of the eigenvalue, every node a Gaussian.

        Args:
            grid: `[g]`, eigenvalues, ascending; by default 1001 points over all nodes and 5 sigma more.
            sigma: Standard deviation of the Gaussian; by default a hundredth of the range of the nodes.

        Returns:
            The curve; its integral over a grid that covers everything is 1.
        """
        return self._smooth(lambda x: x, lambda x: x, grid, sigma)

    def log_density(
        self,
        grid: Tensor | None = None,
        *,
        sigma: float = 0.1,
        threshold: float | None = None,
    ) -> Curve:
        """Return the density per decade: on the axis y = `signed_log(l, threshold)`, where outliers and bulk are both seen.

        A rule of m nodes resolves the bulk to about a m-th of its width, so that what is within that of zero is one node
        or none: the shape there is not to be trusted.

        Args:
            grid: `[g]`, eigenvalues, ascending; by default 1001 points evenly spaced in y, over all nodes and 5 sigma.
            sigma: Standard deviation of the Gaussian around each node, in decades.
            threshold: Magnitude below which the axis is linear; by default `floor`.

        Returns:
            The curve, `position` in decades; its integral over y is 1.
        """
        linear = (self.floor if threshold is None else threshold) or 1.0
        if not linear > 0:
            raise ValueError(f"threshold must be positive, got {linear}.")
        return self._smooth(
            lambda x: signed_log(x, linear), lambda y: signed_exp(y, linear), grid, sigma
        )

    def _smooth(
        self,
        position: Callable[[Tensor], Tensor],
        value: Callable[[Tensor], Tensor],
        grid: Tensor | None,
        sigma: float | None,
    ) -> Curve:
        points = position(self._points()[0])
        low, high = float(points.min()), float(points.max())
        if sigma is None:
            # One value only, as of the zero matrix, has no range.
            sigma = 0.01 * (high - low) or 0.01 * abs(high) or 1.0
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}.")
        if grid is None:
            ends = low - 5 * sigma, high + 5 * sigma
            grid = value(torch.linspace(*ends, _POINTS, dtype=torch.float64))
        grid = grid.to("cpu", torch.float64)
        y = position(grid)
        scale = 1 / (sigma * math.sqrt(2 * math.pi))
        mean, error = self._mean(
            lambda x: scale * torch.exp(-(((y[:, None] - position(x)) / sigma) ** 2) / 2)
        )
        return Curve(grid=grid, position=y, value=mean, standard_error=error)

    def _mean(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean over eigenvalues of f, nodes `[m]` to `[g, m]`, and its standard error, both `[g]`."""
        share = 1 - len(self.deflated) / self.n
        rules = zip(self.nodes, self.weights, strict=True)
        probes = torch.stack([f(nodes) @ weights for nodes, weights in rules])
        value = share * probes.mean(0) + f(self.deflated).sum(1) / self.n
        spread = probes.std(0) if len(probes) > 1 else torch.full_like(value, math.nan)
        return value, share * spread / math.sqrt(len(probes))

    def _points(self) -> tuple[Tensor, Tensor]:
        """Return all values and their masses."""
        share = (1 - len(self.deflated) / self.n) / len(self.nodes)
        masses = [*(share * w for w in self.weights), torch.full_like(self.deflated, 1 / self.n)]
        return torch.cat([*self.nodes, self.deflated]), torch.cat(masses)


def spectral_density(
    operator: SymmetricOperator,
    num_probes: int = 10,
    num_steps: int = 60,
    *,
    seed: int = 0,
    deflate: Eigenvalues | None = None,
    runs: Sequence[LanczosRun] = (),
    reorthogonalize: bool | None = None,
) -> SpectralDensity:
    """Estimate how the eigenvalues of a symmetric operator are distributed.

    For a Gaussian v, the mean of (v^T f(A) v) / (v^T v) is tr f(A) / n, and Lanczos from v gives the quadrature
    sum_j w_j f(l_j) of it. With k eigenvectors Q deflated, the mean over eigenvalues of f is

        (1/n) sum_i f(values_i) + (n - k)/n mean of sum_j w_j f(l_j),    Lanczos on (I - Q Q^T) A (I - Q Q^T) from (I - Q Q^T) v.

    Outliers then cost no steps and add no noise. A bulk below `floor` needs float64.

    Cost: num_probes * num_steps products, less those of `runs`. Memory: 5 vectors, or num_steps + 4 with `reorthogonalize`;
    without, ghost nodes share the weight of the true ones (Greenbaum 1989).

    Args:
        operator: A.
        num_probes: Random vectors, `runs` included; at least 2 for a standard error.
        num_steps: Products for each; fewer where the dimension is smaller or the Krylov space exhausted.
        seed: Of the random vectors. The first is the one that `top_eigenvalues` starts from with this seed.
        deflate: Eigenvalues of A with their vectors.
        runs: Re-orthogonalised Lanczos runs on A from Gaussian vectors, like `Eigenvalues.run`: probes already paid. All
            their steps are used; those with a basis are resumed to `num_steps`. `deflate` takes its nodes out of them.
        reorthogonalize: Keep the basis orthogonal. By default in float64 alone: on a spectrum of many decades ghosts use up
            the steps and lose the small end.

    Returns:
        The density.

    Raises:
        ValueError: An argument is out of range, `deflate` has no vectors, or a run has no node for a deflated eigenvalue.
        SpecDefError: A product is NaN or infinite.

    Example:
        >>> from specdef.curvature.linear import MatrixOperator
        >>> matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0]))
        >>> density = spectral_density(MatrixOperator(matrix), num_probes=50)
        >>> abs(density.moment(1)[0] - 2.0) < 0.5, round(density.quantile(0.5), 4)
        (True, 1.0)
    """
    n = operator.shape[0]
    if num_probes < max(1, len(runs)):
        raise ValueError(f"num_probes must be at least 1 and {len(runs)} runs, got {num_probes}.")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    if deflate is not None and (deflate.vectors is None or len(deflate.values) >= n):
        raise ValueError("deflate must have its vectors, and leave at least one eigenvalue.")
    full = operator.dtype == torch.float64 if reorthogonalize is None else reorthogonalize
    deflated = torch.zeros(0, dtype=torch.float64) if deflate is None else deflate.values
    bulk = operator
    if deflate is not None:
        assert deflate.vectors is not None  # checked above
        bulk = DeflatedOperator(operator, deflate.vectors)
    rules, spent = [], 0
    for run in runs:
        if run.basis is not None and run.num_steps < min(num_steps, n):
            longer = lanczos(operator, None, min(num_steps, n), resume=run, keep_basis=False)
            spent += longer.num_matvecs - run.num_matvecs
            run = longer
        rules.append(_without(run, deflate, operator.dtype))
    # The runs have taken their vectors from the same stream: sharing them changes no other probe.
    probes = gaussian_vectors(operator, seed)
    for _ in runs:
        next(probes)
    m = min(num_steps, n - len(deflated))
    while len(rules) < num_probes:
        start = next(probes)
        if isinstance(bulk, DeflatedOperator):
            start = bulk.project(start.to(bulk.basis))
        # The deflated vectors may span the very vector that they were found from.
        if norm(start) > 1e-6:
            run = lanczos(bulk, start, m, reorthogonalize=full, keep_basis=False)
            spent += run.num_matvecs
            rules.append(run.nodes_and_weights())
    nodes, weights = zip(*rules, strict=True)
    size = max(float(part.abs().max()) for part in (*nodes, deflated) if len(part))
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        deflated=deflated,
        n=n,
        floor=10 * torch.finfo(operator.dtype).eps * size,
        num_matvecs=spent,
    )


def signed_log(values: Tensor, threshold: float) -> Tensor:
    """Return asinh(x / (2 threshold)) / ln 10: sign(x) log10(|x| / threshold) for |x| >> threshold, linear below it.

    >>> signed_log(torch.tensor([-1e6, 0.0, 1e6]), 1e-2).tolist()
    [-8.0, 0.0, 8.0]
    """
    return torch.asinh(values / (2 * threshold)) / math.log(10)


def signed_exp(positions: Tensor, threshold: float) -> Tensor:
    """Return the values whose `signed_log` is given."""
    return 2 * threshold * torch.sinh(positions * math.log(10))


def _without(
    run: LanczosRun, deflate: Eigenvalues | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a run's quadrature of the bulk: without the nodes that stand for deflated eigenvalues.

    Where their Ritz vectors are the deflated ones, this is the quadrature of m - k steps of Lanczos on the deflated operator.
    """
    nodes, coordinates, residuals = run.ritz()
    weights = coordinates[0] ** 2
    if deflate is None:
        return nodes, weights
    rounding = 100 * torch.finfo(dtype).eps * float(nodes.abs().max())
    keep = torch.ones(len(nodes), dtype=torch.bool)
    for value, residual in zip(deflate.values, deflate.residuals, strict=True):
        nearest = int((nodes - value).abs().argmin())
        # Each of the two has an eigenvalue within its residual.
        if float((nodes[nearest] - value).abs()) > float(residuals[nearest] + residual) + rounding:
            raise ValueError(f"A run has no node for the deflated eigenvalue {float(value):.4g}.")
        keep[nearest] = False
    if not bool(keep.any()):
        raise ValueError("A run has no node that is not deflated.")
    return nodes[keep], weights[keep] / weights[keep].sum()
