"""What `specdef predict` computes and reports, and its plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdef.cli.analysis import Progress, Workload
from specdef.curvature.operators import HessianOperator
from specdef.errors import SpecDefError
from specdef.rates.krylov import Shared
from specdef.rates.predict import DEFAULT_SHARE, predict_convergence
from specdef.rates.prediction import Prediction, slowdown

_DRAWN_STEPS = 200
"""Most steps drawn: an adaptive method's curve is a simulation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Predictions for one model.

    Args:
        task: What it is trained to do.
        loss: Now.
        target: Decrease of the loss asked for.
        num_parameters: That move.
        predictions: By optimiser.
        curves: Decrease of the loss after 0, 1, … steps at the best rate, by optimiser; empty where none were asked for.
    """

    task: str
    loss: float
    target: float
    num_parameters: int
    predictions: dict[str, Prediction]
    curves: dict[str, Tensor]


def outcomes(
    work: Workload,
    names: Sequence[str],
    target: float | None,
    progress: Progress,
    what: str,
    *,
    params: Sequence[str] | None,
    dtype: str,
    rates: Sequence[float] | None,
    num_steps: int,
    max_steps: int,
    seed: int,
    curves: bool,
) -> Outcome:
    """Predict for one model and several optimisers.

    Args:
        work: Model, batches and loss.
        names: Optimisers.
        target: Decrease of the loss; None for a tenth of it.
        progress: Told which optimiser is at work.
        what: Which model, for `progress`.
        params: Parameters that move; None for all.
        dtype: Type to compute in.
        rates: Learning rates; None for the best.
        num_steps: Lanczos steps.
        max_steps: Where the search for the target ends.
        seed: Of the random start for the largest eigenvalue.
        curves: Whether curves are wanted.

    Returns:
        The predictions.

    Raises:
        SpecDefError: The loss is not a finite number, or zero where the target should be a tenth of it.
    """
    H = HessianOperator(
        work.loaded.model, work.batches, work.loss, params, dtype=getattr(torch, dtype)
    )
    progress.watch(H)
    loss, gradient = H.loss_and_gradient_at(None)
    if not math.isfinite(loss):
        raise SpecDefError(
            f"{work.loaded.folder}: the loss on this data is {loss}.",
            hint="A locked model in a narrow type does that: try --dtype float64; else check the weights.",
        )
    if target is None:
        target = DEFAULT_SHARE * loss
    if target <= 0:
        raise SpecDefError(
            f"{work.loaded.folder}: the loss on this data is {loss}, so a tenth of it is no target.",
            hint="Give --target.",
        )
    predictions, drawn, shared = {}, {}, Shared()
    for name in names:
        progress.phase(f"{name} on {what}" if what else name)
        found = predict_convergence(
            H, gradient, name, target=target, num_steps=num_steps, learning_rates=rates, loss=loss, max_steps=max_steps,
            seed=seed, shared=shared,
        )  # fmt: skip
        if curves and math.isfinite(found.best_learning_rate):
            # As far as the target: the quadratic model is not meant to hold beyond.
            steps = min(found.steps_to_target, _DRAWN_STEPS)
            drawn[name] = found.loss_curve(found.best_learning_rate, math.ceil(steps))
        # The closure may hold a basis as large as thirty models.
        predictions[name] = replace(found, decrease_after=_gone)
    return Outcome(
        task=work.loaded.task, loss=loss, target=target, num_parameters=H.shape[0], predictions=predictions, curves=drawn
    )  # fmt: skip


def predict_report(found: Outcome, against: Outcome | None) -> dict[str, Any]:
    """Put predictions into JSON values.

    Args:
        found: Of the model.
        against: Of the locked one, at the same target.

    Returns:
        `task, loss, locked_loss, target, num_parameters, optimizers, num_matvecs, num_losses`.
    """
    rows: dict[str, Any] = {}
    for name, prediction in found.predictions.items():
        rows[name] = _numbers(prediction)
        other = against.predictions[name] if against else None
        rows[name]["locked"] = _numbers(other) if other else None
        ratio = slowdown(other, prediction) if other else None
        for key, part in (("slowdown", "mid"), ("slowdown_low", "low"), ("slowdown_high", "high")):
            rows[name][key] = getattr(ratio, part) if ratio else None
    every = [p for outcome in (found, against) if outcome for p in outcome.predictions.values()]
    return {
        "task": found.task, "loss": found.loss, "locked_loss": against.loss if against else None, "target": found.target,
        "num_parameters": found.num_parameters, "optimizers": rows, "num_matvecs": sum(p.num_matvecs for p in every),
        "num_losses": sum(p.num_losses for p in every),
    }  # fmt: skip


def _numbers(prediction: Prediction) -> dict[str, Any]:
    values = prediction.to_dict()
    return {
        "stable_learning_rate": values["stable_learning_rate"], "best_learning_rate": values["best_learning_rate"],
        "steps_to_target": values["steps_to_target"], "steps_to_target_low": values["steps_low"],
        "steps_to_target_high": values["steps_high"], "trustworthy": values["trustworthy"], "reason": values["reason"],
        "error_estimate": values["error_estimate"], "stable_range": values["stable_range"],
        "lambda_max": values["lambda_max"], "learning_rates": values["learning_rates"], "steps": values["steps"],
        "settings": values["optimizer"],
    }  # fmt: skip


def draw(path: Path, found: Outcome, against: Outcome | None) -> None:
    """Draw the predicted losses over the steps, each at its best rate.

    Args:
        path: PNG file to write.
        found: Of the model, with curves.
        against: Of the locked one, dashed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for outcome, style in ((found, "-"), (against, "--")):
        for i, (name, curve) in enumerate(outcome.curves.items() if outcome else ()):
            assert outcome is not None
            prediction = outcome.predictions[name]
            label = f"{name}{', locked' if outcome is against else ''}, rate {prediction.best_learning_rate:.2g}"
            if not prediction.trustworthy:
                label += " (not to be trusted)"
            axis.plot(
                range(len(curve)),
                outcome.loss - curve,
                style,
                marker=".",
                color=f"C{i}",
                label=label,
            )
    axis.axhline(found.loss - found.target, color="0.5", lw=0.8, label="target")
    axis.set_ylim(found.loss - 2 * found.target, found.loss + 0.5 * found.target)
    longest = max((len(c) for o in (found, against) if o for c in o.curves.values()), default=0)
    axis.set_xscale("symlog" if longest > 20 else "linear")
    axis.set_xlim(left=0)
    axis.set(xlabel="steps of full-batch training (not run)", ylabel="predicted loss")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def _gone(_: float, __: int) -> Tensor:
    raise AssertionError("curves are computed before the basis is dropped")
