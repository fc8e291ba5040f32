"""What a guard writes down after each step of a fine-tune, and when the loss it watches will have grown too large."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

FIT_POINTS = 4
"""Least number of values that a growth exponent is fitted to."""


class DriftWarning(UserWarning):
    """The forecast time until the alignment loss reaches its threshold has run short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRecord:
    """Where a fine-tune stands after a step.

    Args:
        step: Steps taken, from 1.
        time: Sum of learning rates so far, of the optimiser's first group.
        in_subspace: 1/2 sum_j lambda_j c_j^2 with c = U (phi - phi_0): the quadratic model's alignment loss from the drift into M.
        drift: |Pi (phi - phi_0)| / |phi - phi_0|; 0 where nothing has moved.
        distance: |phi - phi_0|.
        alignment: Alignment loss measured on the aligned data; None where it was not at this step.
        exponent: Local exponent of the loss that is forecast, over time; None where too few values are known.
        steps_left: Steps at the present learning rate until that loss reaches the threshold; 0 beyond it, infinite where it does
            not grow, None where it is unknown.
    """

    step: int
    time: float
    in_subspace: float
    drift: float
    distance: float
    alignment: float | None
    exponent: float | None = None
    steps_left: float | None = None


def time_left(
    values: Sequence[tuple[float, float]], threshold: float
) -> tuple[float | None, float | None]:
    """Fit A ~ t^k to the later half of a run, and say when A reaches a threshold from where it stands.

    Under gradient flow k is 4 where the first-order drift vanishes, 2 where it does not, and 0 where the run has converged.

    Args:
        values: (time, A) in order of time, the last one now; time is the sum of learning rates.
        threshold: Of A.

    Returns:
        Exponent k, None where the later half holds fewer than four positive values; and the time left: 0 when the threshold is passed or A is no
        number, infinite where A does not grow, None where k is unknown.

    Example:
        >>> k, left = time_left([(t, t**4 / 1e4) for t in range(1, 9)], 1.0)
        >>> round(k, 6), round(left, 6)
        (4.0, 2.0)
    """
    now, value = values[-1]
    if not value < threshold:
        return None, 0.0
    # not more: the first values are rounding, or the discrete steps' n (n - 1) in place of n^2
    first = bisect_left(values, now / 2, key=lambda pair: pair[0])
    known = [(t, a) for t, a in values[first:] if t > 0 and a > 0]
    if len(known) < FIT_POINTS or value <= 0 or known[0][0] == known[-1][0]:
        return None, None
    logs = numpy.log(numpy.array(known))
    k = float(numpy.polyfit(logs[:, 0], logs[:, 1], 1)[0])
    growth = math.log(threshold / value)
    # e^50 times the time so far is as good as never, and a fit to noise is no sign of growth
    return k, now * math.expm1(growth / k) if k > growth / 50 else math.inf
