"""What a diagnosis of alignment fragility leaves behind, as data; pages are made of it elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from specdef.fragility.conditions import Condition
from specdef.fragility.exponent import ExponentFit
from specdef.fragility.forecast import Forecast
from specdef.fragility.observe import Observation
from specdef.fragility.subspace import FisherSubspace


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FragilityReport:
    """The result of a diagnosis.

    Args:
        model: Name of the model.
        aligned: Name of the aligned data.
        task: Name of the fine-tuning data.
        optimizer: Name and settings of the optimiser.
        learning_rate: Constant rate.
        steps: Planned steps.
        batches: "full" or "cycled".
        parameters: "count" of weights, "tensors", and "names".
        subspace: The sensitive subspace.
        gradient_norm: |g| of the task, in the metric.
        initial_overlap: |Pi g| / |g|.
        overlap_random: Root mean square of the overlap of a random subspace, sqrt(d / n).
        overlap_quantile: 97.5 % of random subspaces have an overlap below it.
        gamma: Curvature coupling |F^(1/2) Pi H g|.
        gamma_random: Root mean square of gamma for a random direction of the length of H g.
        gamma_quantile: 97.5 % of random directions have a gamma below it.
        acceleration: |J H g + f''(g, g)|_B of the outputs on the aligned data, the whole constant of the law: the bending of
            the path, and the turning of the subspace, which gamma leaves out.
        acceleration_error: How far it is off.
        conditions: The three conditions.
        forecast: Alignment loss over the planned steps.
        observed: The run; None where none was made.
        exponent: The exponent of the run; None where none was made, or where it has too few points.
        cost: "gradients", "losses", "hessian_products", "fisher_products", "seconds", of the diagnosis without the run.
        verdict: One sentence.
        seed: Of everything random.
        dtype: Type computed in.
        versions: Of specdef, torch and Python.
    """

    model: str
    aligned: str
    task: str
    optimizer: Mapping[str, Any]
    learning_rate: float
    steps: int
    batches: str
    parameters: Mapping[str, Any]
    subspace: FisherSubspace
    gradient_norm: float
    initial_overlap: float
    overlap_random: float
    overlap_quantile: float
    gamma: float
    gamma_random: float
    gamma_quantile: float
    acceleration: float
    acceleration_error: float
    conditions: tuple[Condition, ...]
    forecast: Forecast
    observed: Observation | None
    exponent: ExponentFit | None
    cost: Mapping[str, Any]
    verdict: str
    seed: int
    dtype: str
    versions: Mapping[str, str]

    @property
    def rank(self) -> int:
        """Dimension of the sensitive subspace."""
        return self.subspace.rank

    @property
    def lambda_min(self) -> float:
        """Smallest eigenvalue kept, lambda_d."""
        return float(self.subspace.values[-1])

    @property
    def applicable(self) -> bool:
        """Whether the forecast may be believed."""
        return self.forecast.applicable

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why not, in sentences."""
        return self.forecast.reasons

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; null stands for what is not finite, and for what was not done."""
        plain = (
            "model", "aligned", "task", "optimizer", "learning_rate", "steps", "batches", "parameters", "rank",
            "lambda_min", "gradient_norm", "initial_overlap", "overlap_random", "overlap_quantile", "gamma",
            "gamma_random", "gamma_quantile", "acceleration", "acceleration_error", "applicable", "reasons", "cost", "verdict",
            "seed", "dtype", "versions",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in plain} | {
            "subspace": self.subspace.to_dict(),
            "conditions": [condition.to_dict() for condition in self.conditions],
            "forecast": self.forecast.to_dict(),
            "observed": self.observed.to_dict() if self.observed else None,
            "exponent": self.exponent.to_dict() if self.exponent else None,
        }
        made: dict[str, Any] = _json(values)
        return made


def _json(value: Any) -> Any:
    """Return a value with lists for sequences and None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(name): _json(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
