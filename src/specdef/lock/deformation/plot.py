"""The course of a deformation as a picture: retain loss, utility and the largest singular value over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
"""Okabe and Ito's colours, which the colour-blind tell apart."""

_WIDE = 30
"""Ratio of the largest loss to the smallest from which its axis is logarithmic."""


def draw(
    path: Path,
    history: Sequence[Mapping[str, Any]],
    *,
    kept_step: int,
    metric: str = "utility",
    floor: float | None = None,
    target: float | None = None,
) -> None:
    """Draw the trade-off of a deformation.

    Args:
        path: PNG file to write.
        history: One row per evaluation, as in the certificate's `training["history"]`; numbers that are not finite are None.
        kept_step: The step whose state was kept; 0 where none was.
        metric: Name of the utility.
        floor: Utility a state must have to be kept.
        target: Largest singular value at which the run was to stop.
    """
    from matplotlib.figure import Figure

    def column(name: str) -> list[float]:
        return [math.nan if row[name] is None else float(row[name]) for row in history]

    steps = column("step")
    figure = Figure(figsize=(7, 7.5), layout="constrained")
    loss, utility, sigma = figure.subplots(3, 1, sharex=True)
    loss.plot(
        steps, column("train_loss"), "s--", color=_ORANGE, ms=3, label="retain loss, training"
    )
    loss.plot(steps, column("retain_loss"), "o-", color=_BLUE, ms=3, label="task loss, held out")
    loss.set_ylabel("loss")
    utility.plot(steps, column("utility"), "o-", color=_BLUE, ms=3, label=f"{metric}, held out")
    if floor is not None:
        utility.axhline(floor, color=_ORANGE, ls="--", lw=1.2, label=f"floor {floor:.4g}")
    utility.set_ylabel(metric)
    sigma.plot(steps, column("sigma_max"), "o-", color=_BLUE, ms=3, label="largest of all matrices")
    if target is not None:
        sigma.axhline(target, color=_ORANGE, ls="--", lw=1.2, label=f"target {target:.4g}")
    sigma.set(ylabel="sigma_max", xlabel="step")
    _logarithmic(sigma)
    losses = [x for x in column("train_loss") + column("retain_loss") if math.isfinite(x)]
    if losses and 0 < min(losses) < max(losses) / _WIDE:
        _logarithmic(loss)
    for axis in (loss, utility, sigma):
        if kept_step:
            label = f"kept: step {kept_step}" if axis is loss else None
            axis.axvline(kept_step, color=_GREEN, ls=":", lw=1.6, label=label)
        axis.grid(color="0.9", lw=0.6)
        axis.set_axisbelow(True)
        axis.legend(fontsize="small")
    if not kept_step:
        figure.suptitle("Nothing was kept", fontsize="medium")
    figure.savefig(path, dpi=120, format="png")


def _logarithmic(axis: Any) -> None:
    """Make the vertical axis logarithmic, with plain numbers."""
    from matplotlib.ticker import LogFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.6)))
