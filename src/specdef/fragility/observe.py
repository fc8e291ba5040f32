"""The fine-tune itself, on a displacement beside the model, with the alignment loss recorded along the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, final

import torch

from specdef.fragility.alignment import AlignmentLoss
from specdef.fragility.forecast import Forecast
from specdef.fragility.subspace import FisherSubspace
from specdef.fragility.task import TaskLoss
from specdef.rates.linear import Optimizer


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a run of the fine-tune did to the alignment.

    Args:
        steps: Step numbers at which it was looked at; fewer than planned where the run was stopped.
        alignment: True alignment loss, nats per term.
        in_subspace: 1/2 sum_j lambda_j c_j^2 of the true displacement.
        drift: |Pi phi| / |phi|, the share of the displacement's length within the subspace.
        displacement: |d| in the metric.
        task_loss: Mean loss on all task batches.
        status: "completed", or "diverged" where a loss or a gradient was not finite.
        mode: "full" or "cycled".
        seconds: Wall time.
        band_coverage: Share of the steps at which the loss lay within the forecast's band.
        error_factor: Median of |log10(observed / forecast)| over steps above the rounding floor; NaN where there is none.
        floor: Rounding floor of the alignment loss: below it the loss is noise of the arithmetic.
    """

    steps: tuple[int, ...]
    alignment: tuple[float, ...]
    in_subspace: tuple[float, ...]
    drift: tuple[float, ...]
    displacement: tuple[float, ...]
    task_loss: tuple[float, ...]
    status: str
    mode: str
    seconds: float
    band_coverage: float
    error_factor: float
    floor: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values; the report turns what is not finite into null."""
        return {
            "steps": list(self.steps), "alignment": list(self.alignment), "in_subspace": list(self.in_subspace),
            "drift": list(self.drift), "displacement": list(self.displacement), "task_loss": list(self.task_loss),
            "status": self.status, "mode": self.mode, "seconds": self.seconds, "band_coverage": self.band_coverage,
            "error_factor": self.error_factor, "floor": self.floor,
        }  # fmt: skip


def observe(
    task: TaskLoss,
    alignment: AlignmentLoss,
    subspace: FisherSubspace,
    optimizer: Optimizer,
    learning_rate: float,
    steps: Sequence[int],
    *,
    forecast: Forecast | None = None,
    floor: float = 0.0,
    progress: Callable[[str], None] | None = None,
) -> Observation:
    """Run the fine-tune and look at the alignment loss at some of its steps; the model is left as it is.

    What is trained is the displacement from the start, by torch's own optimiser: the same run but for the rounding of the
    weights, which a short run in float32 would drown in. The model runs in evaluation mode.

    Cost: a gradient for each step, and for each step looked at a forward pass over the aligned data; with cycled batches one
    over the task data too.

    Args:
        task: The task.
        alignment: The alignment loss.
        subspace: The sensitive subspace.
        optimizer: The method.
        learning_rate: Its constant rate.
        steps: Steps at which to look, ascending; the last is the number of steps.
        forecast: What the run is held against; None for nothing.
        floor: Rounding floor of the alignment loss.
        progress: Called with a line of text now and then.

    Returns:
        What happened. A run that leaves the finite ends there.
    """
    began = time.perf_counter()
    start = task.parts[0].flatten(task.parts[0].parameters)
    d = torch.zeros_like(start)
    method = optimizer.build([d], learning_rate)
    # Decoupled decay pulls the weights themselves: (1 - lr w)(start + d) - start = (1 - lr w) d - lr w start.
    pull = learning_rate * getattr(optimizer, "weight_decay", 0.0)
    looked, last, status = set(steps), max(steps), "completed"
    rows: list[tuple[float, ...]] = []
    for step in range(last + 1):
        # The gradient of the next step brings the loss of all batches along, where it sees them all.
        own = math.nan
        gradient = None
        if step < last:
            own, gradient = task.step_loss_and_gradient(step, d)
        if step in looked:
            whole = gradient is not None and len(task.parts) == 1
            length, c = subspace.length(d), subspace.coordinates(d).double()
            drift = float(c.norm()) / length if length else 0.0
            row = (alignment(d), subspace.alignment(d), drift, length, own if whole else task.loss_at(d))  # fmt: skip
            if not all(map(math.isfinite, row)):
                status = "diverged"
                break
            rows.append((step, *row))
            if progress:
                progress(f"step {step} of {last}: alignment loss {row[0]:.3g}, task loss {row[-1]:.4g}")  # fmt: skip
        if gradient is None:
            break
        if not bool(torch.isfinite(gradient).all()):
            status = "diverged"
            break
        d.grad = gradient
        with torch.no_grad():
            method.step()
            if pull:
                d.sub_(start, alpha=pull)
    columns = [tuple(column) for column in zip(*rows, strict=True)] or [()] * 6
    seen = tuple(int(step) for step in columns[0])
    coverage, factor = _compare(seen, columns[1], forecast, floor)
    return Observation(
        steps=seen, alignment=columns[1], in_subspace=columns[2], drift=columns[3], displacement=columns[4],
        task_loss=columns[5], status=status, mode=task.mode, seconds=time.perf_counter() - began,
        band_coverage=coverage, error_factor=factor, floor=floor,
    )  # fmt: skip


def _compare(
    steps: Sequence[int], observed: Sequence[float], forecast: Forecast | None, floor: float
) -> tuple[float, float]:
    """Return the share of steps within the band, and the median of |log10(observed / forecast)| above the floor."""
    if forecast is None or not steps:
        return math.nan, math.nan
    at = [forecast.steps.index(n) for n in steps]
    inside = [forecast.low[i] <= a <= forecast.high[i] for i, a in zip(at, observed, strict=True)]
    factors = [
        abs(math.log10(a / forecast.alignment[i]))
        for i, a in zip(at, observed, strict=True)
        if a > floor and 0 < forecast.alignment[i] < math.inf
    ]
    return sum(inside) / len(inside), median(factors) if factors else math.nan
