"""How far a prediction can be believed: the true loss at displacements that the quadratic model predicts.

Nothing is trained: the model says where the weights would be after t steps, and a forward pass says what the loss is
there. Calibration (experiments/calibration.py): where the decrease measured so differs from the modelled one by a
fraction e, runs took 1 / (1 + e) to 1 + 4 e times the predicted steps; past e = 1/3 some were off by more than a factor
of three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from specdef.curvature.base import CurvatureOperator
from specdef.curvature.lanczos import LanczosRun
from specdef.curvature.linear import SymmetricOperator
from specdef.rates.linear import LinearOptimizer
from specdef.rates.quadratic import Quadratic, decrease

LARGEST_ERROR = 1 / 3
"""Largest error estimate of a trustworthy prediction, unless the true loss meets the target there all the same."""
# How far from the predicted step the true loss along the path may meet the target.
_NEAR = 1.5
_SPREAD = 4.0
# Largest relative change of the predicted decrease when a third of the Lanczos steps is left out.
_QUADRATURE = 0.1
# Curvature along the steepest direction, measured over a rise of this share of the target, relative to lambda_max.
_RISE, _CURVATURE = 0.01, (0.6, 1.7)
# Where the true loss is looked at, in units of the predicted number of steps.
_LOOK = (0.5, 0.75, 1.0, 1.5, 2.0, 4.0)


@final
class Landscape:
    """The change of the loss at a displacement: the true one, or the quadratic itself for a bare matrix.

    Args:
        operator: H.
        gradient: g `[n]`.
    """

    def __init__(self, operator: SymmetricOperator, gradient: Tensor) -> None:
        self.operator, self.gradient = operator, gradient
        self.is_true = isinstance(operator, CurvatureOperator)
        self.loss: float | None = None
        self.num_losses = 0
        if isinstance(operator, CurvatureOperator):
            self.loss = operator.loss()
            self.num_losses = 1

    def change(self, displacement: Tensor) -> float:
        """Return loss at the displacement minus loss at zero; inf where it is not a number."""
        self.num_losses += 1
        if isinstance(self.operator, CurvatureOperator):
            assert self.loss is not None
            value = self.operator.loss_at(displacement) - self.loss
        else:
            product = self.operator @ displacement
            value = float(self.gradient @ displacement) + float(displacement @ product) / 2
        return math.inf if math.isnan(value) else value


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a check of the predicted displacement found.

    Args:
        steps: The steps, corrected where the first step is known to arrive, or known not to.
        error: Relative difference of the decreases; NaN without a displacement to look at.
        low: Fewest steps left possible.
        high: Most steps left possible; inf where no limit is known.
        reason: Why the prediction should not be trusted; empty where it may.
    """

    steps: float
    error: float
    low: float
    high: float
    reason: str


def judge(
    measured: float,
    modelled: float,
    steps: float,
    *,
    first: float,
    target: float,
    crossing: float = math.nan,
) -> Verdict:
    """Turn measured decreases of the loss into an error estimate and a range of steps.

    The first step is no prediction: its displacement is known exactly, and so is the loss after it.

    Args:
        measured: Decrease of the true loss at the predicted displacement.
        modelled: What the model says it is there.
        steps: Predicted steps.
        first: Decrease of the true loss after the first step.
        target: Decrease wanted.
        crossing: Steps at which the true loss along the predicted path meets the target; NaN if it is not known.

    Returns:
        The verdict.
    """
    if first >= target:
        error = abs(measured / modelled - 1) if steps == 1 else 0.0
        return Verdict(steps=1.0, error=error, low=1.0, high=1.0, reason="")
    least = 2.0
    error = abs(measured / modelled - 1) if math.isfinite(measured) else math.inf
    low, high = steps / (1 + error), steps * (1 + _SPREAD * error)
    if math.isfinite(crossing):
        low, high = min(low, crossing), max(high, crossing)
    reason = ""
    near = steps / _NEAR <= crossing <= _NEAR * steps
    if error > LARGEST_ERROR and not near:
        reason = (
            f"the quadratic model does not hold as far as the target: after {steps:.0f} steps it says the loss has fallen by "
            f"{modelled:.3g}, and where it says the weights are then it has {'fallen' if measured >= 0 else 'risen'} by "
            f"{abs(measured):.3g}"
        )
    return Verdict(
        steps=max(least, steps),
        error=error,
        low=max(least, float(math.floor(low + 1e-9))),
        high=max(least, float(math.ceil(high - 1e-9))) if math.isfinite(high) else math.inf,
        reason=reason,
    )


def check_path(
    landscape: Landscape,
    displacements: Callable[[Sequence[int]], Sequence[Tensor]],
    modelled: Callable[[int], float],
    steps: float,
    target: float,
    max_steps: int,
) -> Verdict:
    """Compare the true loss with the model's along the path that the model predicts.

    Cost: up to 7 evaluations of the loss.

    Args:
        landscape: The true loss.
        displacements: Step numbers to displacements, each `[n]`.
        modelled: Step number to the model's decrease.
        steps: Predicted steps to the target, or inf.
        target: Decrease wanted.
        max_steps: Where the search ended.

    Returns:
        The verdict.
    """
    if math.isinf(steps):
        reason = f"the quadratic model does not reach the target within {max_steps} steps at any stable rate"
        return Verdict(steps=steps, error=math.nan, low=float(max_steps), high=math.inf, reason=reason)  # fmt: skip
    if not landscape.is_true:
        return Verdict(steps=steps, error=0.0, low=steps, high=steps, reason="")
    looked_at = sorted({1, *(max(1, round(share * steps)) for share in _LOOK)})
    found: dict[int, float] = {}
    for t, there in zip(looked_at, displacements(looked_at), strict=True):
        if bool(there.isfinite().all()):
            found[t] = -landscape.change(there)
    at = int(steps)
    if at not in found:
        reason = "the predicted displacement is not finite"
        return Verdict(steps=steps, error=math.inf, low=1.0, high=math.inf, reason=reason)
    return judge(
        found[at],
        modelled(at),
        steps,
        first=found.get(1, -math.inf),
        target=target,
        crossing=_crossing(found, target),
    )


def check_quadrature(
    run: LanczosRun, optimizer: LinearOptimizer, rate: float, steps: float, max_steps: int
) -> str:
    """Say whether the decrease predicted from two thirds of the Lanczos steps is another one."""
    m = max(1, 2 * run.num_steps // 3)
    if run.exhausted or m == run.num_steps:
        return ""
    shorter = LanczosRun(
        diagonal=run.diagonal[:m], off_diagonal=run.off_diagonal[: m - 1], residual_norm=float(run.off_diagonal[m - 1]),
        start_norm=run.start_norm, basis=None, tail=None, exhausted=False, num_matvecs=m,
    )  # fmt: skip
    at = int(min(steps, max_steps))
    few, all_ = (
        float(decrease(Quadratic.from_run(part), optimizer, rate, at)) for part in (shorter, run)
    )
    if abs(few - all_) <= _QUADRATURE * abs(all_):
        return ""
    return f"Lanczos has not converged: {m} steps predict a decrease of {few:.3g}, {run.num_steps} of {all_:.3g}; raise num_steps"


def check_curvature(
    landscape: Landscape, direction: Tensor, lambda_max: float, target: float
) -> str:
    """Say whether the steepest direction is as steep at a small distance as at none.

    Cost: 2 evaluations of the loss.

    Args:
        landscape: The true loss.
        direction: `[n]`, along which the second derivative of the loss is lambda_max.
        lambda_max: Largest eigenvalue.
        target: The distance looked at is where the quadratic rises by a hundredth of this.

    Returns:
        What is wrong, or nothing.
    """
    if not landscape.is_true or lambda_max <= 0:
        return ""
    step = math.sqrt(2 * _RISE * target / lambda_max) * direction
    measured = (landscape.change(step) + landscape.change(-step)) / (2 * _RISE * target)
    if _CURVATURE[0] <= measured <= _CURVATURE[1]:
        return ""
    return (
        f"lambda_max does not describe the loss even nearby: along its direction the curvature is {measured:.2g} times as "
        "large at a small distance, so the stable rate is uncertain"
    )


def join(reasons: Sequence[str]) -> str:
    """Return the reasons that there are as one text."""
    return "; ".join(reason for reason in reasons if reason)


def _crossing(found: dict[int, float], target: float) -> float:
    """Return where the measured decrease first meets the target, between the steps looked at; NaN if nowhere."""
    before_t, before = 0, 0.0
    for t, value in sorted(found.items()):
        if value >= target:
            return before_t + (t - before_t) * (target - before) / (value - before)
        before_t, before = t, value
    return math.nan
