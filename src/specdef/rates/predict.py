"""Convergence of an optimiser from curvature at the start: stable rates and steps to a target, without training.

The gradient's spectral measure (Lanczos started at g) knows the run of every method with constant coefficients on the
quadratic model; adaptive methods are run on a low-rank model instead. Whether the model holds as far as the target is
measured: the true loss is evaluated at the displacement that the model predicts. That takes forward passes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdef.curvature.base import CurvatureOperator
from specdef.curvature.linear import SymmetricOperator
from specdef.errors import SpecDefError
from specdef.rates.adaptive import AdaptiveOptimizer
from specdef.rates.kfac import KroneckerFactors, PreconditionedOperator
from specdef.rates.krylov import Shared, steepest
from specdef.rates.linear import KFAC, LinearOptimizer, Optimizer
from specdef.rates.optimizers import resolve
from specdef.rates.prediction import Prediction as Prediction
from specdef.rates.prediction import Question
from specdef.rates.quadratic import (
    Quadratic,
    best_rate_for_target,
    decrease,
    share_travelled,
    steps_to_target,
)
from specdef.rates.selfcheck import (
    Landscape,
    Verdict,
    check_curvature,
    check_path,
    check_quadrature,
    join,
)
from specdef.rates.simulated import predict_adaptive
from specdef.rates.stability import largest_step

DEFAULT_SHARE = 0.1
"""Default target: this share of the loss; half of what the quadratic model can reach where there is no loss."""


def predict_convergence(
    operator: SymmetricOperator,
    gradient: Tensor | None,
    optimizer: Optimizer | str,
    *,
    target: float | None = None,
    num_steps: int = 30,
    learning_rates: Sequence[float] | None = None,
    loss: float | None = None,
    max_steps: int = 10_000,
    lambda_max: float | None = None,
    memory_limit: int = 4 * 2**30,
    seed: int = 0,
    shared: Shared | None = None,
) -> Prediction:
    """Predict the largest stable rate, the best rate, and the steps to a target, without training.

    Stable rate, methods with constant coefficients (and K-FAC): c / lambda_max with the method's constant c, or for a model
    the rate at which the first step raises the loss, where that is smaller. Above c / lambda_max the steepest direction is
    no longer contracted and the loss stops descending smoothly; networks, unlike quadratics, often go on training there
    (Cohen et al. 2021, arXiv 2103.00065): `stable_range` ends where the first step already fails. lambda_max is sought
    from a random start as well, since the gradient may hardly see the direction that turns unstable.
    Stable rate, adaptive methods: where the first step, lr times a known direction, does not raise the true loss.

    Steps: whole steps until the loss has fallen by `target`, at the best rate below the stable one. The error estimate
    compares the true loss at the predicted displacement with the model's.

    Cost: num_steps products, up to 80 for lambda_max (not for adaptive methods), 20 to 30 evaluations of the loss.
    Memory: num_steps + 10 vectors, or about 12 where `memory_limit` is smaller.

    Args:
        operator: H: a `HessianOperator`, or any symmetric operator (no check against a true loss then).
        gradient: g `[n]`; None takes the operator's own.
        optimizer: An instance or a name, see `OPTIMIZERS`.
        target: Decrease of the loss wanted, in its units: the same number for a locked model and its original. By default
            a tenth of the loss, or without one half of what the model can reach.
        num_steps: Lanczos steps.
        learning_rates: Rates to predict the steps of; the best rate is then the best of these. By default it is sought
            below the stable one.
        loss: The loss now, for the default target; None takes the operator's.
        max_steps: Where the search for the target ends; adaptive methods are simulated for 500 at most.
        lambda_max: Largest eigenvalue, where it is known (for K-FAC that of the preconditioned matrix); 0 takes what the
            gradient's own run finds.
        memory_limit: Bytes for bases of vectors. Where they do not fit, the vectors are made a second time when they are
            needed, the steepest direction is not looked along, and the model of an adaptive method has a lower rank.
        seed: Of the random start for lambda_max.
        shared: Takes what it needs from here and leaves it here: for several optimisers on one operator at one point, which
            then pay for one Lanczos run between them.

    Returns:
        The prediction, with its own verdict on itself.

    Raises:
        ValueError: An argument is out of range, or missing for this kind of operator.
        SpecDefError: The gradient is not finite.

    Example:
        >>> from specdef.curvature.linear import MatrixOperator
        >>> H = MatrixOperator(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)))
        >>> found = predict_convergence(H, torch.ones(2), "gd", target=0.6)
        >>> round(found.stable_learning_rate, 6), found.steps_to_target
        (0.5, 4.0)
    """
    optimizer = resolve(optimizer)
    g = _gradient(operator, gradient)
    if num_steps < 1 or max_steps < 1:
        raise ValueError("num_steps and max_steps must be at least 1.")
    if target is not None and not 0 < target < math.inf:
        raise ValueError(f"target must be positive, got {target}.")
    if learning_rates is not None and not (
        learning_rates and all(0 < rate < math.inf for rate in learning_rates)
    ):
        raise ValueError("learning_rates must be positive numbers, at least one.")
    landscape = Landscape(operator, g)
    loss = landscape.loss if loss is None else loss
    question = Question(
        target=DEFAULT_SHARE * loss if target is None and loss is not None and loss > 0 else target,
        num_steps=min(num_steps, operator.shape[0]),
        rates=None if learning_rates is None else tuple(map(float, learning_rates)),
        max_steps=max_steps,
        lambda_max=lambda_max,
        memory_limit=memory_limit,
        seed=seed,
    )
    if not bool(g.any()):
        return _at_rest(optimizer, landscape, question)
    if isinstance(optimizer, AdaptiveOptimizer):
        return predict_adaptive(operator, g, optimizer, landscape, question)
    assert isinstance(optimizer, LinearOptimizer)
    return _predict_linear(operator, g, optimizer, landscape, question, shared or Shared())


def _predict_linear(
    operator: SymmetricOperator,
    g: Tensor,
    optimizer: LinearOptimizer,
    landscape: Landscape,
    question: Question,
    shared: Shared,
) -> Prediction:
    # P^-1/2, and the matrix that the method sees; both the identity's but for K-FAC.
    root, seen = _preconditioned(operator, optimizer)
    start = root(g)
    if seen is not operator:  # another matrix, which nobody else asks for
        shared = Shared()
    before = shared.num_matvecs
    krylov = shared.path(seen, start, question.num_steps, question.memory_limit)
    run, model = krylov.run, Quadratic.from_run(krylov.run)
    top = shared.steepest(seen, question.seed, question.memory_limit) if question.lambda_max is None else None  # fmt: skip
    known = top.value if top else question.lambda_max or 0.0
    lambda_max = max(float(model.nodes[-1]), known)
    target = question.target or model.reachable / 2 or model.gradient_norm**2
    # The theory's limit, and the one that the first step meets.
    limit = optimizer.stability_limit / lambda_max if lambda_max > 0 else math.inf
    psi = share_travelled(optimizer, torch.zeros(1, dtype=torch.float64), 1)
    first = -float(psi) * root(start)
    guess = limit if math.isfinite(limit) else target / float(start @ start)
    line = largest_step(lambda rate: landscape.change(rate * first), guess)
    # A bare matrix is its own model, on which the theory is exact; momentum may overshoot there, and converges.
    stable = min(limit, line) if landscape.is_true else limit
    # Steps: at the rates given, or at the best below the limit.
    steps: tuple[float, ...] = ()
    best, fewest, notes = math.nan, math.inf, []
    verdict = Verdict(steps=math.inf, error=math.nan, low=1.0, high=math.inf, reason="")
    limited = 0 < stable < math.inf
    if not limited:
        notes.append("no rate was found at which training begins to fail: the loss has no positive curvature, or does not fall")  # fmt: skip
    if question.rates:
        rates = torch.tensor(question.rates, dtype=torch.float64)
        found = steps_to_target(model, optimizer, rates, target, max_steps=question.max_steps)
        steps = tuple(found.tolist())
        best, fewest = question.rates[int(found.argmin())], min(steps)
        if best > stable:
            notes.append("the best of the rates given is not stable")
    elif limited:
        best, fewest = best_rate_for_target(model, optimizer, target, stable, max_steps=question.max_steps)  # fmt: skip
    if question.rates or limited:
        verdict = check_path(
            landscape,
            lambda t: [root(d) for d in krylov.displacements(optimizer, best, t)],
            lambda t: float(decrease(model, optimizer, best, t)),
            fewest,
            target,
            question.max_steps,
        )
        steps = tuple(verdict.steps if rate == best else t for rate, t in zip(question.rates or (), steps, strict=True))  # fmt: skip
        if not verdict.low == verdict.high == 1.0:  # then it needs no model
            notes.append(check_quadrature(run, optimizer, best, fewest, question.max_steps))
    if top is not None:
        notes.append("" if top.converged else "the largest eigenvalue has not converged")
        if top.vector is not None:
            notes.append(check_curvature(landscape, root(top.vector), known, target))
    if isinstance(seen, PreconditionedOperator) and seen.factors.uncovered:
        left = seen.factors.uncovered
        notes.append(f"K-FAC has no block for {len(left)} of the matrices ({left[0]}, …), which gradient descent trains")  # fmt: skip
    reason = join([verdict.reason, *notes])
    return Prediction(
        optimizer=optimizer,
        target=target,
        stable_learning_rate=stable,
        stable_range=(stable, max(limit, line)),
        best_learning_rate=best,
        steps_to_target=verdict.steps,
        steps_low=verdict.low,
        steps_high=verdict.high,
        learning_rates=question.rates or (),
        steps=steps,
        lambda_max=lambda_max,
        nodes=model.nodes,
        weights=model.weights,
        gradient_norm=model.gradient_norm,
        trustworthy=not reason,
        reason=reason,
        error_estimate=verdict.error,
        num_matvecs=shared.num_matvecs - before,
        num_losses=landscape.num_losses,
        decrease_after=lambda rate, t: decrease(model, optimizer, rate, torch.arange(t + 1))[0],
    )


def _at_rest(optimizer: Optimizer, landscape: Landscape, question: Question) -> Prediction:
    """Return what can be said at a point without a gradient: the limit, where it comes from curvature."""
    stable, lambda_max, num_matvecs = math.inf, math.nan, 0
    if isinstance(optimizer, LinearOptimizer):
        _, seen = _preconditioned(landscape.operator, optimizer)
        top = steepest(seen, question.seed, question.memory_limit)
        lambda_max, num_matvecs = top.value, top.num_matvecs
        stable = optimizer.stability_limit / lambda_max if lambda_max > 0 else math.inf
    none = torch.zeros(0, dtype=torch.float64)
    return Prediction(
        optimizer=optimizer,
        target=question.target or math.nan,
        stable_learning_rate=stable,
        stable_range=(stable, stable),
        best_learning_rate=math.nan,
        steps_to_target=math.inf,
        steps_low=math.inf,
        steps_high=math.inf,
        learning_rates=question.rates or (),
        steps=tuple(math.inf for _ in question.rates or ()),
        lambda_max=lambda_max,
        nodes=none,
        weights=none,
        gradient_norm=0.0,
        trustworthy=False,
        reason="the gradient is zero: training does not move",
        error_estimate=math.nan,
        num_matvecs=num_matvecs,
        num_losses=landscape.num_losses,
        decrease_after=lambda _, t: torch.zeros(t + 1, dtype=torch.float64),
    )


def _gradient(operator: SymmetricOperator, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        if not isinstance(operator, CurvatureOperator):
            raise ValueError("gradient must be given for an operator that has none of its own.")
        gradient = operator.gradient()
    if gradient.shape != (operator.shape[0],):
        raise ValueError(f"gradient must be [{operator.shape[0]}], got {list(gradient.shape)}.")
    g = gradient.detach().to(operator.device, operator.dtype)
    if not bool(g.isfinite().all()):
        raise SpecDefError(
            "The gradient is NaN or infinite.",
            hint="Check the weights and the data, or compute in float64.",
        )
    return g


def _preconditioned(
    operator: SymmetricOperator, optimizer: LinearOptimizer
) -> tuple[Callable[[Tensor], Tensor], SymmetricOperator]:
    """Return v to P^-1/2 v, and P^-1/2 H P^-1/2."""
    if not isinstance(optimizer, KFAC):
        return lambda v: v, operator
    if not isinstance(operator, CurvatureOperator):
        raise ValueError("K-FAC needs a model: pass a HessianOperator, not a bare matrix.")
    factors = KroneckerFactors(operator, optimizer.damping)
    return lambda v: factors.power(-0.5, v), PreconditionedOperator(operator, factors)
