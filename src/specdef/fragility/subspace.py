"""The sensitive subspace M of an aligned behaviour: the leading eigenvectors of its Fisher matrix.

arXiv 2602.15799 speaks of the Fisher matrix F of a skill at the aligned weights and of the span M of its top d
eigenvectors. Here the vectors live in the coordinates phi = P^(1/2) theta of the optimiser's metric P, in which a
preconditioned method is plain gradient descent: they are eigenvectors of P^(-1/2) F P^(-1/2).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn

from specdef.curvature.eigenvalues import top_eigenvalues
from specdef.curvature.linear import DeflatedOperator, SymmetricOperator
from specdef.curvature.losses import Batch, Loss
from specdef.curvature.operators import EmpiricalFisherOperator, GGNOperator
from specdef.curvature.parameters import Params
from specdef.curvature.trace import trace
from specdef.errors import SpecDefError
from specdef.fragility.task import Metric

Fisher = Literal["ggn", "empirical"]
"""ggn: the exact Hessian of the alignment loss, for cross-entropy the Fisher matrix. empirical: the mean of g g^T over
gradients g of single rows, which also depends on the labels; its values are in other units."""

# Products spent on the subspace at most: enough for eight values of a spectrum that decays like a power.
PRODUCTS = 24
PROBES = 8
# Basis of Lanczos: PRODUCTS and one more, in chunks of 16 rows; the smaller one restarts.
BASES = (31, 15)
_TOL = 1e-3


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FisherSubspace:
    """The leading eigenvectors of the Fisher matrix of aligned data, in the metric's coordinates.

    Args:
        vectors: U `[d, n]`, orthonormal rows, in the coordinates phi = P^(1/2) theta.
        values: `[d]` float64 on the CPU, eigenvalues, descending; nats per squared unit of phi.
        errors: `[d]` float64, estimated error of each value, see `Eigenvalues`.
        converged: `[d]` bool.
        trace: Trace of the whole matrix, estimated.
        trace_error: Its standard error; 0 where there is nothing outside the subspace, NaN for a single probe.
        energy: Share of the trace that lies in the subspace, at most 1.
        energy_wanted: The share that was asked for.
        num_matvecs: Products with the Fisher matrix spent.
        fisher: "ggn", or "empirical".
        metric: p^(1/2) `[n]`; None for the Euclidean metric.
        parameters: Names of the parameters, in the order in which they lie in a flat vector.
    """

    vectors: Tensor
    values: Tensor
    errors: Tensor
    converged: Tensor
    trace: float
    trace_error: float
    energy: float
    energy_wanted: float
    num_matvecs: int
    fisher: str
    metric: Tensor | None
    parameters: tuple[str, ...]

    @property
    def rank(self) -> int:
        """Dimension d of the subspace."""
        return len(self.values)

    def coordinates(self, displacement: Tensor) -> Tensor:
        """Return c = U P^(1/2) d, where a displacement of the weights lies in the subspace.

        Args:
            displacement: d `[n]`, in the order of `parameters`, in the weights' own units.

        Returns:
            `[rank]`, in the type of the vectors.
        """
        d = displacement.to(self.vectors)
        return self.vectors @ (d if self.metric is None else self.metric * d)

    def alignment(self, displacement: Tensor) -> float:
        """Return 1/2 sum_j lambda_j c_j^2: the quadratic model's alignment loss from the part within the subspace.

        Args:
            displacement: d `[n]`.

        Returns:
            Nats per term (squared outputs for `MSELoss`).
        """
        c = self.coordinates(displacement).double().cpu()
        return float(self.values @ c**2) / 2

    def length(self, displacement: Tensor) -> float:
        """Return |P^(1/2) d|, the length of a displacement in the metric.

        Args:
            displacement: d `[n]`.

        Returns:
            The length.
        """
        d = displacement.to(self.vectors)
        return float(torch.linalg.vector_norm(d if self.metric is None else self.metric * d))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the vectors and the metric as JSON values."""
        return {
            "values": self.values.tolist(),
            "errors": self.errors.tolist(),
            "converged": self.converged.tolist(),
            "trace": self.trace,
            "trace_error": self.trace_error,
            "energy": self.energy,
            "energy_wanted": self.energy_wanted,
            "num_matvecs": self.num_matvecs,
            "fisher": self.fisher,
        }


def fisher_operator(
    model: nn.Module,
    aligned: Iterable[Batch],
    loss: Loss,
    params: Params = None,
    *,
    fisher: Fisher = "ggn",
    dtype: torch.dtype | None = None,
    memory_limit: int | None = None,
) -> GGNOperator | EmpiricalFisherOperator:
    """Return the Fisher matrix of aligned data as an operator.

    Args:
        model: The model.
        aligned: Batches of aligned behaviour.
        loss: The loss.
        params: Which parameters, see `select_parameters`.
        fisher: ggn or empirical.
        dtype: Type to compute in.
        memory_limit: Bytes of graph to keep between products.

    Returns:
        The operator.

    Raises:
        ValueError: `fisher` is unknown.
    """
    if fisher not in get_args(Fisher):
        raise ValueError(f"fisher must be ggn or empirical, got {fisher!r}.")
    options: dict[str, Any] = {"dtype": dtype, "memory_limit": memory_limit}
    if fisher == "ggn":
        return GGNOperator(model, aligned, loss, params, **options)
    return EmpiricalFisherOperator(model, aligned, loss, params, per="sample", **options)


def fisher_subspace(
    model: nn.Module,
    aligned: Iterable[Batch],
    loss: Loss,
    params: Params = None,
    *,
    fisher: Fisher = "ggn",
    energy: float = 0.9,
    max_rank: int = 8,
    metric: Tensor | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    memory_limit: int | None = None,
) -> FisherSubspace:
    """Find the sensitive subspace of a model's behaviour on aligned data.

    Cost: up to 24 products with the Fisher matrix (3 `max_rank` for more than 8) and 8 for its trace, each about 4/3 of a
    gradient. Memory: 32 + 2 max_rank vectors, and the graph.

    Args:
        model: The model, left as it is.
        aligned: Batches of aligned behaviour.
        loss: The loss; its labels only say which terms count, unless `fisher` is empirical.
        params: Which parameters, see `select_parameters`; None for all that require a gradient.
        fisher: ggn or empirical.
        energy: Share of the trace wanted, in (0, 1]: the rank is the smallest that has it.
        max_rank: Largest rank.
        metric: The diagonal p `[n]` of the metric, positive; None for ones.
        seed: Of Lanczos' start and of the probes for the trace.
        dtype: Type to compute in; None takes the parameters' own, and float32 for half precision.
        memory_limit: Bytes of graph to keep between products; None for half of what is free.

    Returns:
        The subspace.

    Raises:
        ValueError: An argument is out of range.
        SpecDefError: There is no data, the model is not finite, or the matrix is zero.

    Example:
        The squared error of w x has the Fisher matrix 2 x^2:

        >>> from specdef.curvature.losses import MSELoss
        >>> net = nn.Linear(1, 1, bias=False)
        >>> found = fisher_subspace(net, [(torch.tensor([[3.0]]), torch.tensor([[1.0]]))], MSELoss())
        >>> found.rank, [round(value, 3) for value in found.values.tolist()]
        (1, [18.0])
    """
    operator = fisher_operator(
        model, aligned, loss, params, fisher=fisher, dtype=dtype, memory_limit=memory_limit
    )
    return leading_subspace(
        operator, Metric.of(None if metric is None else metric.to(operator.device, operator.dtype)),
        energy=energy, max_rank=max_rank, seed=seed, fisher=fisher, parameters=tuple(operator.parameters),
    )  # fmt: skip


def leading_subspace(
    operator: SymmetricOperator,
    metric: Metric,
    *,
    energy: float,
    max_rank: int,
    seed: int,
    fisher: Fisher,
    parameters: tuple[str, ...],
    max_basis: int = BASES[0],
) -> FisherSubspace:
    """Find the leading eigenvectors of P^(-1/2) F P^(-1/2), as many as carry a share of its trace.

    Args:
        operator: F.
        metric: P.
        energy: Share of the trace wanted.
        max_rank: Largest rank.
        seed: Of everything random.
        fisher: What F is.
        parameters: Names for the result.
        max_basis: Vectors that Lanczos keeps before it restarts.

    Returns:
        The subspace; directions of eigenvalue zero, to the accuracy known, are not in it.

    Raises:
        ValueError: An argument is out of range.
        SpecDefError: A product is not finite, or F is zero.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}.")
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}.")
    F = metric.operator(operator)
    k = min(max_rank, F.shape[0])
    found = top_eigenvalues(
        F, k, which="LA", tol=_TOL, max_matvecs=max(PRODUCTS, 3 * k), seed=seed,
        max_basis=max(max_basis, k + 3),
    )  # fmt: skip
    assert found.vectors is not None
    kept = int((found.values > found.errors).sum())
    if not kept:
        raise SpecDefError(
            "the Fisher matrix of the aligned data is zero: the selected parameters do not change the model's answers there",
            hint="Select other parameters, or check the aligned data.",
        )
    spent, rest, error = found.num_matvecs, 0.0, 0.0
    if F.shape[0] > k:
        # What is outside the vectors alone is left to chance.
        outside = trace(DeflatedOperator(F, found.vectors), PROBES, seed=seed)
        spent += outside.num_matvecs
        rest, error = max(0.0, outside.value), outside.standard_error
    values = found.values.clamp(min=0)
    total = float(values.sum()) + rest
    reached = (values[:kept].cumsum(0) >= energy * total).nonzero()
    rank = int(reached[0]) + 1 if len(reached) else kept
    vectors = found.vectors[:rank].clone() if rank < k else found.vectors
    if metric.inverse_root is not None:
        # Rounding would come back enlarged where a vector is taken to theta's coordinates.
        vectors.masked_fill_(metric.inverse_root == 0, 0.0)
    return FisherSubspace(
        vectors=vectors,
        values=values[:rank],
        errors=found.errors[:rank],
        converged=found.converged[:rank],
        trace=total,
        trace_error=error,
        energy=min(1.0, float(values[:rank].sum()) / total),
        energy_wanted=energy,
        num_matvecs=spent,
        fisher=fisher,
        metric=metric.root,
        parameters=parameters,
    )
