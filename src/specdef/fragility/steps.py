"""Step numbers to look at, and what is read off a curve over them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specdef.fragility.exponent import fit_line

POINTS = 24
"""Steps of the grid at most."""
FAR = 100
"""A threshold is looked for up to this many times the planned steps."""


def step_grid(steps: int) -> list[int]:
    """Return at most 24 step numbers from 1 to the last, in geometric progression.

    >>> step_grid(10)
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    """
    return sorted({round(x) for x in np.geomspace(1, steps, POINTS).tolist()})


def further_steps(steps: int) -> list[int]:
    """Return the grid, and step numbers on to 100 times its last.

    Args:
        steps: The planned steps.

    Returns:
        Step numbers, ascending.
    """
    return sorted({*step_grid(steps), *(round(x) for x in np.geomspace(steps, FAR * steps, 96).tolist())})  # fmt: skip


def late_exponent(steps: Sequence[int], curve: Tensor, s: Tensor, r: Tensor) -> float:
    """Return the exponent of a curve over the last decade of its steps, time counted as it fits better.

    Args:
        steps: Step numbers, ascending.
        curve: `[s]`.
        s: `[s]`, time to first order, see `path.clocks`.
        r: `[s]`, to second order.

    Returns:
        The exponent; NaN for fewer than 3 steps after the first, or a curve that is not positive and finite.
    """
    late = [i for i, n in enumerate(steps) if n >= max(2, steps[-1] / 10)]
    y = curve[late]
    if len(late) < 3 or not bool(((y > 0) & torch.isfinite(y)).all()):
        return math.nan
    clocks = (s[late].log().numpy(), (2 * r[late]).log().numpy() / 2)
    return min((fit_line(time, y.log().numpy()) for time in clocks), key=lambda line: line.rms).slope  # fmt: skip


def crossing(steps: Sequence[int], curve: Tensor, threshold: float) -> float | None:
    """Return when a curve first reaches a threshold, interpolated on logarithms; None where it does not.

    Args:
        steps: Step numbers.
        curve: `[s]`.
        threshold: The value.

    Returns:
        A number of steps, the first one where the curve begins above.
    """
    above = (curve >= threshold).nonzero()
    if not len(above):
        return None
    i = int(above[0])
    before = float(curve[i - 1]) if i else 0.0
    if i == 0 or before <= 0 or not math.isfinite(float(curve[i])):
        return float(steps[i])
    part = math.log(threshold / before) / math.log(float(curve[i]) / before)
    return float(steps[i - 1] * (steps[i] / steps[i - 1]) ** part)
