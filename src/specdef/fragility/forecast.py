"""Alignment loss over the steps of a fine-tune that has not been run, with a band and a statement whether it applies."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TimeToThreshold:
    """When the alignment loss reaches a threshold.

    Args:
        threshold: Nats per term.
        steps: By the point forecast, interpolated between grid steps; None where it does not within 100 times the
            planned steps, or only beyond the steps for which the model is valid.
        low: Earliest, by the upper edge of the band.
        high: Latest, by the lower edge.
    """

    threshold: float
    steps: float | None
    low: float | None
    high: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelError:
    """How wrong the quadratic models are where they say the weights will be, measured without training.

    Args:
        path: Relative error of F^(1/2) d from the task's gradient there, which the model of the path takes as linear.
        metric: Relative error of F^(1/2) d from the change of Adam's preconditioner on the way; 0 for other methods.
        alignment_ratio: True alignment loss there over 1/2 d^T F d.
        gradient_change: |g there - g| / |g|, in the metric.
        krylov: Relative change of F^(1/2) d when two Lanczos steps are left out.
        at_step: The step whose displacement was looked at.
    """

    path: float
    metric: float
    alignment_ratio: float
    gradient_change: float
    krylov: float
    at_step: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The alignment loss forecast over steps.

    The curves are lists over `steps`, in nats per term (squared outputs for `MSELoss`).

    Args:
        steps: Step numbers, 1 to the planned number.
        alignment: The point forecast.
        low: Lower edge of the band.
        high: Upper edge.
        taylor: The closed form within the subspace: 1/2 (t^2 a - t^3 b + t^4/4 gamma^2).
        quartic: Its last term alone, gamma^2 t^4 / 8.
        in_subspace: The part of the point forecast within the subspace, without noise.
        stochastic: What the noise of one batch a step adds, in expectation; zero for full batches.
        onset_steps: Step from which the quartic term is larger than the quadratic one; None where there is no coupling.
        time_to_threshold: When it becomes too much.
        exponent: Exponent of the point forecast without noise, over the last decade of steps; NaN for too few.
        regime: "quartic", "quadratic" or "mixed", by the exponent.
        applicable: Whether the forecast may be believed.
        reasons: Why not, each a sentence with its numbers.
        learning_rate: The rate it is for.
        lambda_max: Largest curvature of the task found, in the metric.
        valid_steps: Steps up to which the measured errors, continued, stay within what is accepted; may exceed the plan.
        model_error: The measured errors.
    """

    steps: tuple[int, ...]
    alignment: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    taylor: tuple[float, ...]
    quartic: tuple[float, ...]
    in_subspace: tuple[float, ...]
    stochastic: tuple[float, ...]
    onset_steps: float | None
    time_to_threshold: TimeToThreshold
    exponent: float
    regime: str
    applicable: bool
    reasons: tuple[str, ...]
    learning_rate: float
    lambda_max: float
    valid_steps: float
    model_error: ModelError

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values; the report turns what is not finite into null."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}  # fmt: skip
