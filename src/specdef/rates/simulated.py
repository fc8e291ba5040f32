"""Predictions for adaptive methods: a line search for the stable rate, and runs on a low-rank model for the steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specdef.curvature.base import CurvatureOperator
from specdef.curvature.linear import SymmetricOperator
from specdef.rates.adaptive import AdaptiveOptimizer
from specdef.rates.prediction import Prediction, Question
from specdef.rates.selfcheck import Landscape, Verdict, join, judge
from specdef.rates.stability import largest_step
from specdef.rates.surrogate import Surrogate, first_step, simulate, surrogate_of

MAX_SIMULATED = 500
"""Steps simulated at most; fewer on large models, since each costs some 8 m n operations."""
_OPERATIONS, _LEAST_STEPS = 2**36, 50
# Rates tried when none are given: the stable one divided by powers of two.
_HALVINGS = 50
# All runs together make so many times the steps that one may make.
_RUNS = 6
# Rank of the model however little memory there is; 5 gives the steps that 30 gives.
_LEAST_RANK = 4


def predict_adaptive(
    operator: SymmetricOperator,
    gradient: Tensor,
    optimizer: AdaptiveOptimizer,
    landscape: Landscape,
    question: Question,
) -> Prediction:
    """Predict for a method with an elementwise preconditioner; see `predict_convergence`.

    Args:
        operator: H.
        gradient: g `[n]`, not zero.
        optimizer: The method, from a fresh state.
        landscape: The loss.
        question: What is asked.

    Returns:
        The prediction. Its `stable_range` ends at the stable rate and begins where a second step, as the model predicts
        it, would raise the loss.
    """
    room = question.memory_limit // (gradient.numel() * gradient.element_size()) - 4
    rank = max(_LEAST_RANK, min(question.num_steps, room))
    model = surrogate_of(operator, gradient, optimizer.preconditioner(gradient), rank)
    weights = operator.flatten(operator.parameters) if isinstance(operator, CurvatureOperator) else None  # fmt: skip
    # The line search starts where the quadratic turns up again along the first step.
    step = first_step(optimizer, model.gradient)
    slope = float(model.gradient @ step)
    bend = 2 * (model.change(step) - slope)
    target = question.target or slope**2 / (4 * abs(bend) or 1.0)  # half of the best first step
    guess = -2 * slope / bend if bend > 0 else target / -slope
    stable = largest_step(lambda rate: landscape.change(rate * step), guess)
    low = stable
    if 0 < stable < math.inf:
        low = largest_step(lambda rate: _second(model, optimizer, landscape, rate, weights), stable)  # fmt: skip
    nodes, shares = model.run.nodes_and_weights()

    def curve(rate: float, steps: int) -> Tensor:
        changes, _ = simulate(model, optimizer, rate, steps, weights=weights)
        changes += [math.inf] * (steps - len(changes))
        return -torch.tensor([0.0, *changes], dtype=torch.float64)

    affordable = max(_LEAST_STEPS, _OPERATIONS // (rank * gradient.numel()))
    limit = min(question.max_steps, MAX_SIMULATED, affordable)
    tried: list[tuple[float, float, Verdict]] = []
    spent = 0
    for rate in question.rates or (stable / 2**i for i in range(1, _HALVINGS)):
        if not question.rates and (spent > _RUNS * limit or not 0 < stable < math.inf):
            break
        changes, displacement = simulate(model, optimizer, rate, limit, weights=weights, target=target)  # fmt: skip
        spent += len(changes)
        steps, verdict = math.inf, _unreached(limit)
        if changes and changes[-1] <= -target:
            steps = float(len(changes))
            verdict = _verdict(landscape, displacement, -changes[-1], steps, target, rate * step)
            steps = verdict.steps
        tried.append((rate, steps, verdict))
        trusted = [entry[1] for entry in tried if not entry[2].reason]
        if not question.rates and trusted and steps > 2 * min(trusted):
            break
    # Of the rates at which the model holds, if there is one: far above them it promises anything.
    best, fewest, verdict = min(
        tried, key=lambda entry: (bool(entry[2].reason), entry[1]), default=(math.nan, math.inf, _unreached(limit))
    )  # fmt: skip
    reasons = [verdict.reason]
    if not 0 < stable < math.inf:
        reasons.append("no rate was found at which the first step begins to raise the loss")
    elif best > stable:
        reasons.append("the best of the rates given is not stable")
    reason = join(reasons)
    return Prediction(
        optimizer=optimizer,
        target=target,
        stable_learning_rate=stable,
        stable_range=(min(low, stable), stable),
        best_learning_rate=best,
        steps_to_target=fewest,
        steps_low=verdict.low,
        steps_high=verdict.high,
        learning_rates=question.rates or (),
        steps=tuple(entry[1] for entry in tried) if question.rates else (),
        lambda_max=float(nodes[-1]),
        nodes=nodes,
        weights=shares,
        gradient_norm=model.run.start_norm,
        trustworthy=not reason,
        reason=reason,
        error_estimate=verdict.error,
        num_matvecs=model.run.num_matvecs,
        num_losses=landscape.num_losses,
        decrease_after=curve,
    )


def _second(
    model: Surrogate,
    optimizer: AdaptiveOptimizer,
    landscape: Landscape,
    rate: float,
    weights: Tensor | None,
) -> float:
    """Return the change of the loss where the model says two steps lead."""
    changes, displacement = simulate(model, optimizer, rate, 2, weights=weights)
    return landscape.change(displacement) if len(changes) == 2 else math.inf


def _unreached(limit: int) -> Verdict:
    return Verdict(
        steps=math.inf,
        error=math.nan,
        low=float(limit),
        high=math.inf,
        reason=f"the model does not reach the target within {limit} steps",
    )


def _verdict(
    landscape: Landscape,
    displacement: Tensor,
    modelled: float,
    steps: float,
    target: float,
    first: Tensor,
) -> Verdict:
    if not landscape.is_true:
        return Verdict(steps=steps, error=0.0, low=steps, high=steps, reason="")
    return judge(
        -landscape.change(displacement),
        modelled,
        steps,
        first=-landscape.change(first),
        target=target,
    )
