"""The measuring side: full-batch training of the real network, to hold predictions against.

Training runs on a flat vector through `gradient_at`, so the model itself is never changed, with torch's own optimiser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from specdef.curvature.base import CurvatureOperator
from specdef.rates.kfac import KroneckerFactors
from specdef.rates.linear import KFAC, Optimizer
from specdef.rates.optimizers import resolve

Criterion = Literal["smooth", "bounded"]
"""When a run counts as stable, over all its steps. bounded: the loss never rises above its start. smooth: it never rises by
more than a share of its start above the lowest value so far. A linear theory speaks of the second; a network that has
left the regime of the theory may stay bounded far beyond."""

_OCTAVES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """One run.

    Args:
        learning_rate: Its constant rate.
        losses: Loss after 0, 1, 2, … steps; shorter than asked where the run was stopped.
    """

    learning_rate: float
    losses: tuple[float, ...]

    def steps_to(self, target: float) -> float:
        """Return the first step at which the loss has fallen by a target, inf if it never has."""
        met = (t for t, loss in enumerate(self.losses) if loss <= self.losses[0] - target)
        return float(next(met, math.inf))


@dataclass(frozen=True, slots=True, kw_only=True)
class StableRate:
    """The largest stable rate found, and between which two rates it lies.

    Args:
        rate: Largest rate found stable; 0 where none was.
        failed: Smallest rate above it found unstable; inf where none was.
        num_runs: Runs made.
        num_gradients: Gradients spent.
    """

    rate: float
    failed: float
    num_runs: int
    num_gradients: int


def train(
    operator: CurvatureOperator,
    optimizer: Optimizer | str,
    learning_rate: float,
    num_steps: int,
    *,
    target: float | None = None,
    rise: float = math.inf,
    above_lowest: bool = False,
) -> TrainingRun:
    """Train with full batches at a constant rate; the model is left as it is.

    K-FAC's preconditioner is that of the start, as in the prediction.

    Args:
        operator: Model, data and loss.
        optimizer: An instance or a name.
        learning_rate: Constant rate.
        num_steps: Steps to make.
        target: Stop when the loss has fallen by this much.
        rise: Stop when the loss has risen by more than this.
        above_lowest: Whether `rise` counts from the lowest loss so far, not from the start.

    Returns:
        The losses. A loss that is not finite ends the run too.
    """
    optimizer = resolve(optimizer)
    start = operator.flatten(operator.parameters)
    theta = start.clone()
    method = optimizer.build([theta], learning_rate)
    factors = KroneckerFactors(operator, optimizer.damping) if isinstance(optimizer, KFAC) else None
    losses: list[float] = []
    for step in range(num_steps + 1):
        displacement = theta - start
        if step == num_steps:
            losses.append(operator.loss_at(displacement))
            break
        loss, gradient = operator.loss_and_gradient_at(displacement)
        losses.append(loss)
        reference = min(losses) if above_lowest else losses[0]
        arrived = target is not None and loss <= losses[0] - target
        if arrived or not loss <= reference + rise or not bool(gradient.isfinite().all()):
            break
        theta.grad = gradient if factors is None else factors.power(-1.0, gradient)
        with torch.no_grad():
            method.step()
    return TrainingRun(learning_rate=learning_rate, losses=tuple(losses))


def largest_stable_rate(
    operator: CurvatureOperator,
    optimizer: Optimizer | str,
    guess: float,
    *,
    criterion: Criterion = "bounded",
    tolerance: float = 0.02,
    num_steps: int = 50,
    ratio: float = 1.15,
) -> StableRate:
    """Measure the largest rate with which training is stable, seen from below.

    Starting from a sixteenth of the guess, or as far below as a stable rate takes, the rate is doubled until a run fails, and
    the last interval bisected. Networks can be stable again above (a spike may kill the unit it came from); what is
    found is the end of the first interval, but for unstable stretches narrower than an octave.

    Args:
        operator: Model, data and loss.
        optimizer: An instance or a name.
        guess: Where to begin; the result should not depend on it.
        criterion: What counts as stable.
        tolerance: For smooth: the rise tolerated, as a share of the loss at the start.
        num_steps: Steps of a run.
        ratio: Ratio of the rates between which the answer lies at the end.

    Returns:
        The rate and what it cost.

    Raises:
        ValueError: An argument is out of range.
    """
    if not 0 < guess < math.inf:
        raise ValueError(f"guess must be positive, got {guess}.")
    if criterion not in ("smooth", "bounded"):
        raise ValueError(f'criterion must be "smooth" or "bounded", got {criterion!r}.')
    smooth = criterion == "smooth"
    allowed = tolerance * abs(operator.loss()) if smooth else 0.0
    runs = gradients = 0

    def stable(rate: float) -> bool:
        nonlocal runs, gradients
        run = train(operator, optimizer, rate, num_steps, rise=allowed, above_lowest=smooth)
        runs, gradients = runs + 1, gradients + len(run.losses) - 1
        reference = min(run.losses) if smooth else run.losses[0]
        return len(run.losses) == num_steps + 1 and run.losses[-1] <= reference + allowed

    low, octaves = guess / 16, 0
    while not stable(low):
        low, octaves = low / 4, octaves + 2
        if octaves > _OCTAVES:
            return StableRate(rate=0.0, failed=low * 4, num_runs=runs, num_gradients=gradients)
    high, octaves = 2 * low, 0
    while stable(high):
        low, high, octaves = high, 2 * high, octaves + 1
        if octaves > _OCTAVES:
            return StableRate(rate=low, failed=math.inf, num_runs=runs, num_gradients=gradients)
    while high / low > ratio:
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (middle, high) if stable(middle) else (low, middle)
    return StableRate(rate=low, failed=high, num_runs=runs, num_gradients=gradients)
