"""The diagnosis: subspace, conditions and forecast before any fine-tuning, and on request the run to hold them against."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version

import torch
from torch import nn

from specdef.curvature.losses import Batch, Loss
from specdef.curvature.operators import GGNOperator
from specdef.curvature.parameters import Params, select_parameters
from specdef.fragility import conditions
from specdef.fragility.acceleration import output_acceleration
from specdef.fragility.alignment import AlignmentLoss
from specdef.fragility.applicability import adaptive_reasons
from specdef.fragility.exponent import ExponentFit, fit_exponent
from specdef.fragility.forecast import Forecast
from specdef.fragility.inputs import check, check_known, in_type, loss_for, naming
from specdef.fragility.law import QuarticLaw
from specdef.fragility.memory import plan_memory
from specdef.fragility.noise import measure_noise
from specdef.fragility.observe import Observation
from specdef.fragility.observe import observe as run_fine_tune
from specdef.fragility.path import QuadraticPath, clocks
from specdef.fragility.predict import Forecaster
from specdef.fragility.prefix import remembered_prefix
from specdef.fragility.report import FragilityReport
from specdef.fragility.subspace import (
    Fisher,
    FisherSubspace,
    fisher_operator,
    leading_subspace,
)
from specdef.fragility.task import BatchMode, TaskLoss
from specdef.rates.linear import LinearOptimizer, Optimizer

# Values this many times the rounding floor take part in a fit.
_ABOVE_FLOOR = 10.0


def fragility(
    model: nn.Module,
    aligned: Iterable[Batch],
    task: Iterable[Batch],
    *,
    learning_rate: float,
    loss: Loss | None = None,
    params: Params = None,
    optimizer: Optimizer | str = "sgd",
    steps: int = 100,
    batches: BatchMode = "full",
    fisher: Fisher = "ggn",
    energy: float = 0.9,
    max_rank: int = 8,
    subspace: FisherSubspace | None = None,
    krylov_steps: int = 8,
    threshold: float = 0.05,
    observe: bool = False,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    memory_limit: int | None = None,
    progress: Callable[[str], None] | None = None,
    model_name: str = "",
    aligned_name: str = "",
    task_name: str = "",
) -> FragilityReport:
    """Forecast what a fine-tune will do to a model's behaviour on aligned data, without running it.

    Cost: with the defaults about 18 products with the task's Hessian (two gradients each), 41 with the aligned data's Fisher
    matrix (4/3 of a gradient each), a few gradients and forward passes. Memory: about 60 vectors of the selected parameters,
    or 45 where those do not fit, and the larger of the two graphs. docs/fragility.md has the definitions.

    Args:
        model: The aligned model. It is not changed, and runs in evaluation mode.
        aligned: Batches of the behaviour to keep: dicts of the model's arguments with "labels", or (input, target) pairs.
        task: Batches of the fine-tune.
        learning_rate: Its constant rate.
        loss: Loss of both; None chooses by the labels: floating ones `MSELoss`, one for each token `LMLoss`, else
            `ClassificationLoss`.
        params: What is fine-tuned, see `select_parameters`; None for all that require a gradient.
        optimizer: sgd, gd, heavy_ball, nesterov, adam or adamw, or an instance with other settings.
        steps: Planned steps, at least 2.
        batches: "full": each step sees the mean of all task batches; "cycled": one after the other.
        fisher: Matrix of the subspace: "ggn", or "empirical". The forecast of the alignment loss takes the first always.
        energy: Share of the Fisher matrix' trace that the subspace shall have.
        max_rank: Its largest dimension.
        subspace: The sensitive subspace, where it is known from another task: same model, aligned data, parameters and `fisher`, in
            the Euclidean metric. Methods in that metric use it; Adam finds its own.
        krylov_steps: Dimension of the path's Krylov space, at least 2.
        threshold: Alignment loss that is too much, nats per term (squared outputs for `MSELoss`).
        observe: Whether to run the fine-tune as well and compare.
        seed: Of everything random.
        dtype: Type to compute in; None takes the parameters' own, and float32 for half precision.
        memory_limit: Bytes for vectors and graphs; None for half of what is free for each.
        progress: Called with a line of text now and then.
        model_name: For the report; by default the class.
        aligned_name: For the report.
        task_name: For the report.

    Returns:
        The report.

    Raises:
        ValueError: An argument is out of range.
        SelectionError: No such parameter.
        SpecDefError: There is no data, the model is not finite, there is nothing to forecast, or memory is too small.
    """
    began = time.perf_counter()
    method = check(
        optimizer, learning_rate=learning_rate, steps=steps, batches=batches, krylov_steps=krylov_steps,
        threshold=threshold, fisher=fisher,
    )  # fmt: skip
    say = progress or _silent
    kept, tuned_on = list(aligned), list(task)
    names = list(select_parameters(model, params))
    loss = loss or loss_for(kept or tuned_on)
    model, dtype = in_type(model, names, dtype)
    tensors = select_parameters(model, names)
    n, device = sum(p.numel() for p in tensors.values()), next(iter(tensors.values())).device
    plan = plan_memory(
        n, dtype, device, max_rank=max_rank, krylov_steps=krylov_steps, memory_limit=memory_limit,
        known=subspace is not None and isinstance(method, LinearOptimizer),
    )  # fmt: skip

    with remembered_prefix(model, names):
        # The task: its gradient, the metric and the path. Its graph goes before the aligned data's comes.
        say("gradient and curvature of the task")
        tuned = naming("task", lambda: TaskLoss(model, tuned_on, loss, names, mode=batches, dtype=dtype, memory_limit=plan.graph_limit))  # fmt: skip
        gradient, metric = tuned.gradient_and_metric(method)
        H = metric.operator(tuned)
        path = QuadraticPath(H, metric.scale(gradient), krylov_steps, seed=seed)
        tuned.release()

        # The aligned data: the subspace, and the Fisher matrix along the path.
        say("sensitive subspace of the aligned data")
        F = naming("aligned", lambda: GGNOperator(model, kept, loss, names, dtype=dtype, memory_limit=plan.graph_limit))  # fmt: skip
        alignment = AlignmentLoss(F)
        other = F if fisher == "ggn" else fisher_operator(
            model, kept, loss, names, fisher=fisher, dtype=dtype, memory_limit=plan.graph_limit
        )  # fmt: skip
        if subspace is not None and metric.root is None:
            check_known(subspace, tuple(names), n, fisher)
        else:
            subspace = leading_subspace(
                other, metric, energy=energy, max_rank=max_rank, seed=seed, fisher=fisher, parameters=tuple(names),
                max_basis=plan.max_basis,
            )  # fmt: skip
        if other is not F:
            other.refresh()
        law = QuarticLaw.of(subspace, path)

        say("forecast")
        in_metric = metric.operator(F)
        forecaster = Forecaster(
            path=path, subspace=subspace, law=law, fisher=in_metric, optimizer=method, learning_rate=learning_rate,
            steps=steps, noise=measure_noise(tuned, gradient, metric, in_metric, seed), floor=alignment.rounding_floor(seed),
        )  # fmt: skip
        forecaster.measure(alignment, tuned, metric)
        forecast = forecaster.forecast(threshold, adaptive_reasons(method, forecaster.error, path.gradient_norm, tuned, metric))  # fmt: skip
        acceleration = output_acceleration(
            alignment, path, metric, matrix=forecaster.matrix, largest=float(forecaster.subspace.values[0]),
            floor=forecaster.floor, horizon=learning_rate * steps,
        )  # fmt: skip
        cost = {
            "gradients": tuned.num_gradients,
            "losses": alignment.num_losses + tuned.num_losses,
            "hessian_products": path.num_matvecs,
            "fisher_products": F.num_matvecs + (other.num_matvecs if other is not F else 0),
            "seconds": time.perf_counter() - began,
        }
        F.refresh()

        observed, exponent = None, None
        if observe:
            say("the fine-tune itself")
            observed = run_fine_tune(
                tuned, alignment, subspace, method, learning_rate, forecast.steps, forecast=forecast,
                floor=forecaster.floor, progress=progress,
            )  # fmt: skip
            exponent = _exponent(observed, forecast, method)

    random = math.sqrt(subspace.rank / n)
    overlap_quantile = conditions.overlap_quantile(subspace.rank, n)
    values = subspace.values.tolist()
    gamma_random = law.coupling_norm * math.sqrt(sum(values) / n)
    gamma_quantile = conditions.coupling_quantile(values, n, law.coupling_norm, seed)
    judged = (
        conditions.low_rank(subspace),
        conditions.initial_orthogonality(
            law.overlap, overlap_quantile, random, subspace.rank, n, forecaster.quartic_over_quadratic()
        ),
        conditions.curvature_coupling(law.gamma, gamma_quantile, gamma_random),
    )  # fmt: skip
    return FragilityReport(
        model=model_name or type(model).__name__,
        aligned=aligned_name,
        task=task_name,
        optimizer=method.to_dict(),
        learning_rate=learning_rate,
        steps=steps,
        batches=batches,
        parameters={"count": n, "tensors": len(names), "names": names},
        subspace=subspace,
        gradient_norm=path.gradient_norm,
        initial_overlap=law.overlap,
        overlap_random=random,
        overlap_quantile=overlap_quantile,
        gamma=law.gamma,
        gamma_random=gamma_random,
        gamma_quantile=gamma_quantile,
        acceleration=acceleration[0],
        acceleration_error=acceleration[1],
        conditions=judged,
        forecast=forecast,
        observed=observed,
        exponent=exponent,
        cost=cost,
        verdict=_verdict(forecast, steps),
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        versions=_versions(),
    )


def _exponent(observed: Observation, forecast: Forecast, method: Optimizer) -> ExponentFit | None:
    """Fit the exponent within the forecast's validity, or without that limit where nothing is left to fit there."""
    if len(observed.steps) < 3:
        return None
    s, r = clocks(method, observed.steps)
    point = forecast.alignment[: len(observed.steps)]
    fits = [
        fit_exponent(
            observed.steps, observed.alignment, floor=_ABOVE_FLOOR * observed.floor, last_step=last,
            clocks=(s.tolist(), r.tolist()), forecast=point,
        )
        for last in (forecast.valid_steps, math.inf)
    ]  # fmt: skip
    return fits[0] if fits[0] is not None and fits[0].is_power_law else fits[1]


def _verdict(forecast: Forecast, steps: int) -> str:
    """Say it in one sentence."""
    when, low, high = forecast.alignment[-1], forecast.low[-1], forecast.high[-1]
    reach = forecast.time_to_threshold
    if not forecast.applicable:
        return f"Not applicable: {forecast.reasons[0]}"
    after = f"after {steps} steps the alignment loss is forecast at {when:.3g} ({low:.3g} to {high:.3g})"
    if reach.steps is not None and reach.steps <= steps:
        return f"Fragile: {after}; it passes {reach.threshold:.3g} at step {reach.steps:.0f}."
    if high >= reach.threshold:
        return f"Possibly fragile: {after}, and the band reaches {reach.threshold:.3g}."
    later = (
        f"at step {reach.steps:.0f}"
        if reach.steps is not None
        else "not within the forecast's reach"
    )
    return f"Not fragile over the planned steps: {after}; it passes {reach.threshold:.3g} {later}."


def _versions() -> dict[str, str]:
    return {
        "specdef": version("specdef"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _silent(_: str) -> None:
    """Report nothing."""
