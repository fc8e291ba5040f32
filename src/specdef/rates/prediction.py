"""What a prediction says, and the slowdown that two of them make."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from specdef.rates.linear import Optimizer


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked; see `predict_convergence`.

    Args:
        target: Decrease of the loss wanted; None leaves it to the model.
        num_steps: Lanczos steps.
        rates: Rates to predict the steps of; None seeks the best.
        max_steps: Where the search for the target ends.
        lambda_max: Largest eigenvalue, where it is known.
        memory_limit: Bytes for bases of vectors.
        seed: Of the random start for lambda_max.
    """

    target: float | None
    num_steps: int
    rates: tuple[float, ...] | None
    max_steps: int
    lambda_max: float | None
    memory_limit: int
    seed: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How an optimiser would fare, from curvature at the start alone.

    Step counts are whole numbers, inf where the target is not met. All of it speaks of full batches and a constant rate.

    Args:
        optimizer: The optimiser.
        target: Decrease of the loss that counts as arrived, in its units.
        stable_learning_rate: Largest rate, see `predict_convergence` for what it is the limit of.
        stable_range: Between them lies where training starts to fail; the networks measured mostly stayed inside.
        best_learning_rate: The rate with the fewest steps to the target (of those below the stable one, or given).
        steps_to_target: Steps at that rate.
        steps_low: Fewest steps that the error estimate leaves possible.
        steps_high: Most of them; inf where no limit is known.
        learning_rates: The rates asked for.
        steps: Steps at each of them.
        lambda_max: Largest eigenvalue of H, or of P^-1/2 H P^-1/2.
        nodes: `[m]`, eigenvalues as the gradient sees them; empty for a zero gradient.
        weights: `[m]`, the gradient's share at each.
        gradient_norm: |g|, or |P^-1/2 g|.
        trustworthy: Whether the checks held.
        reason: Why not, in words; empty where they held.
        error_estimate: Relative difference between the measured and the modelled decrease of the loss at the predicted
            displacement; NaN where it could not be measured.
        num_matvecs: Curvature products spent.
        num_losses: Evaluations of the loss spent.
    """

    optimizer: Optimizer
    target: float
    stable_learning_rate: float
    stable_range: tuple[float, float]
    best_learning_rate: float
    steps_to_target: float
    steps_low: float
    steps_high: float
    learning_rates: tuple[float, ...]
    steps: tuple[float, ...]
    lambda_max: float
    nodes: Tensor
    weights: Tensor
    gradient_norm: float
    trustworthy: bool
    reason: str
    error_estimate: float
    num_matvecs: int
    num_losses: int
    decrease_after: Callable[[float, int], Tensor] = field(repr=False, compare=False)

    def loss_curve(self, learning_rate: float, num_steps: int) -> Tensor:
        """Compute how far the loss has fallen in the quadratic model.

        Args:
            learning_rate: Constant rate.
            num_steps: Steps t.

        Returns:
            Decrease after 0, 1, …, t steps, `[t + 1]` float64; negative where the loss has risen.
        """
        return self.decrease_after(learning_rate, num_steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON values; null where infinite or unknown."""
        plain = ("stable_learning_rate", "best_learning_rate", "steps_to_target", "steps_low", "steps_high")  # fmt: skip
        more = ("target", "lambda_max", "gradient_norm", "error_estimate")
        return {
            "optimizer": self.optimizer.to_dict(),
            **{name: _finite(getattr(self, name)) for name in (*plain, *more)},
            "stable_range": [_finite(value) for value in self.stable_range],
            "learning_rates": list(self.learning_rates),
            "steps": [_finite(value) for value in self.steps],
            "trustworthy": self.trustworthy,
            "reason": self.reason,
            "num_matvecs": self.num_matvecs,
            "num_losses": self.num_losses,
        }


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """How many times more steps one model needs than another to the same decrease of the loss.

    Args:
        low: From the fewest steps of the first and the most of the second.
        mid: Ratio of the predicted steps; inf where only the first misses the target, NaN where both do.
        high: From the most and the fewest.
        trustworthy: Whether both predictions are.
    """

    low: float
    mid: float
    high: float
    trustworthy: bool


def slowdown(locked: Prediction, unlocked: Prediction) -> Slowdown:
    """Compare two predictions with the same target and optimiser.

    Args:
        locked: Of the locked model.
        unlocked: Of the one it was made from.

    Returns:
        The ratio of the steps, each at its own best rate.

    Raises:
        ValueError: The targets or the optimisers differ.
    """
    if not math.isclose(locked.target, unlocked.target, rel_tol=1e-6):
        raise ValueError(
            f"Both predictions must have the same target, got {locked.target} and {unlocked.target}: pass target=…."
        )
    if locked.optimizer != unlocked.optimizer:
        raise ValueError("Both predictions must be for the same optimizer.")
    return Slowdown(
        low=_ratio(locked.steps_low, unlocked.steps_high),
        mid=_ratio(locked.steps_to_target, unlocked.steps_to_target),
        high=_ratio(locked.steps_high, unlocked.steps_low),
        trustworthy=locked.trustworthy and unlocked.trustworthy,
    )


def _ratio(steps: float, control: float) -> float:
    return math.nan if math.isinf(steps) and math.isinf(control) else steps / control


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
