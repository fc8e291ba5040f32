"""When a forecast should not be believed: each reason a sentence with its numbers."""

from __future__ import annotations

import math

from specdef.fragility.forecast import ModelError
from specdef.fragility.subspace import FisherSubspace
from specdef.fragility.task import Metric, TaskLoss
from specdef.rates.adaptive import Adam, AdamW
from specdef.rates.linear import Optimizer

LARGEST_ERROR = 0.5
"""Relative error of the path from which on the forecast is not applicable."""
LARGEST_RATIO = 2.0
"""Likewise, true alignment loss over the quadratic one, or the inverse."""
_LEFT_FLOW = 0.25  # of the stability limit: lr lambda_max = 0.5 for gradient descent
_CHANGE = 0.5  # of Adam's gradient, in the metric: beyond it the metric is another one
_DECAY = 0.1  # weight decay over gradient, in the metric


def reasons_against(
    error: ModelError,
    optimizer: Optimizer,
    learning_rate: float,
    lambda_max: float,
    subspace: FisherSubspace,
    *,
    noise: float,
    last: float,
) -> list[str]:
    """Say why a forecast should not be believed.

    Args:
        error: What was measured of the model's errors.
        optimizer: The method.
        learning_rate: Its rate.
        lambda_max: Largest curvature of the task, in the metric.
        subspace: The sensitive subspace.
        noise: The most that the noise of single batches adds to the alignment loss.
        last: What the mean gradient makes by the last step.

    Returns:
        Sentences; none where it may be.
    """
    lr, top, limit = learning_rate, lambda_max, optimizer.stability_limit
    found = []
    if lr * top >= limit:
        found.append(
            f"The learning rate {lr:.3g} is beyond the stability limit {limit / top:.3g} = {limit:.3g} / lambda_max."
        )
    elif lr * top > _LEFT_FLOW * limit:
        found.append(
            f"The steps are large: learning rate times lambda_max is {lr * top:.3g} of at most {limit:.3g}; up to "
            f"{_LEFT_FLOW * limit:.3g} they follow the gradient flow."
        )
    if not math.isfinite(error.path):
        found.append(f"The model's path at step {error.at_step} leads where nothing is finite.")
    elif error.path > LARGEST_ERROR:
        found.append(
            f"At the forecast weights of step {error.at_step} the path is off by {error.path:.3g} of itself in F^(1/2), "
            f"more than {LARGEST_ERROR}: the task's loss is not quadratic that far."
        )
    if error.metric > LARGEST_ERROR:
        found.append(
            f"The preconditioner of {optimizer.name} does not stay: by step {error.at_step} that moves the path by "
            f"{error.metric:.3g} of itself in F^(1/2), more than {LARGEST_ERROR}."
        )
    ratio = error.alignment_ratio
    if math.isfinite(error.path) and not 1 / LARGEST_RATIO <= ratio <= LARGEST_RATIO:
        found.append(
            f"At the forecast weights of step {error.at_step} the true alignment loss is {ratio:.3g} times the "
            f"quadratic one, more than a factor of {LARGEST_RATIO:.3g} off."
        )
    if noise > last:
        found.append(
            f"The noise of single batches adds up to {noise:.3g} to the alignment loss, more than the {last:.3g} that the "
            "mean gradient makes by the last step."
        )
    values, errors = subspace.values, subspace.errors
    if not float(values[-1]) > float(errors[-1]):
        found.append(
            f"The subspace is not resolved: its last eigenvalue {float(values[-1]):.3g} is known to {float(errors[-1]):.3g} only."
        )
    return found


def adaptive_reasons(
    optimizer: Optimizer, error: ModelError, gradient_norm: float, task: TaskLoss, metric: Metric
) -> list[str]:
    """Say why the flow in an adaptive method's metric would not be what it is taken for.

    Args:
        optimizer: The method.
        error: What was measured of the model's errors.
        gradient_norm: |g| of the task, in the metric.
        task: The task.
        metric: The metric.

    Returns:
        Sentences; none for methods without a preconditioner.
    """
    if not isinstance(optimizer, Adam | AdamW):
        return []
    found = []
    if error.gradient_change > _CHANGE:
        found.append(
            f"The preconditioner of {optimizer.name} does not stay: at the forecast weights the task's gradient has changed by "
            f"{error.gradient_change:.3g} of itself, more than {_CHANGE}."
        )
    if optimizer.weight_decay:
        first = task.parts[0]
        theta = first.flatten(first.parameters)
        pull = theta if metric.root is None else metric.root * theta
        share = optimizer.weight_decay * float(pull.norm()) / gradient_norm
        if share > _DECAY:
            found.append(
                f"The weight decay of {optimizer.weight_decay:.3g}, which the forecast leaves out, pulls with {share:.3g} of "
                f"the gradient's force, more than {_DECAY}."
            )
    return found
