"""Statistics over few seeds: an interval for a mean, and a median where some runs never arrived."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit  # type: ignore[import-untyped]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return a mean and its 95 % interval, by Student's t.

    Args:
        values: One per seed, at least one.

    Returns:
        (mean, low, high); low and high are nan for a single value, and where a value is not finite.

    >>> [round(x, 2) for x in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    mean = fmean(values)
    n = len(values)
    if n < 2 or not math.isfinite(mean):
        return mean, math.nan, math.nan
    half = float(stdtrit(n - 1, 0.975)) * stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def ratio_interval(tops: Sequence[float], bottoms: Sequence[float]) -> tuple[float, float, float]:
    """Return a ratio of means and its 95 % interval, by Student's t on what the ratio leaves of each pair.

    Differs from a mean of ratios in that one small denominator does not decide.

    Args:
        tops: One per seed.
        bottoms: The same; their mean must not be 0.

    Returns:
        (ratio, low, high); low and high are nan for a single pair.

    >>> [round(x, 2) for x in ratio_interval([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])]
    [1.0, -0.24, 2.24]
    """
    mean = fmean(bottoms)
    ratio = fmean(tops) / mean
    left = [ratio + (t - ratio * b) / mean for t, b in zip(tops, bottoms, strict=True)]
    return ratio, *mean_interval(left)[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Censored:
    """A time, or a bound below it.

    Args:
        value: The time; or a time up to which it had not come.
        censored: Whether it is such a bound.
    """

    value: float
    censored: bool

    def __str__(self) -> str:
        """Return "3", or ">= 3"."""
        return f"{'>= ' if self.censored else ''}{self.value:.3g}"


def median_time(times: Sequence[Censored]) -> Censored:
    """Return the median by Kaplan and Meier's estimate of the survival function.

    Args:
        times: One per seed, at least one; censored ones had not arrived yet at their value.

    Returns:
        The earliest time by which half have arrived; a bound, the largest time seen, if that is not known.

    >>> str(median_time([Censored(value=2, censored=False), Censored(value=8, censored=True), Censored(value=8, censored=True)]))
    '>= 8'
    """
    surviving = 1.0
    # Of equal times arrivals count before bounds: who had not arrived at t was still at risk there.
    order = sorted(times, key=lambda t: (t.value, t.censored))
    for i, time in enumerate(order):
        if not time.censored:
            surviving *= 1 - 1 / (len(order) - i)
            if surviving <= 0.5 + 1e-12:
                return time
    return Censored(value=order[-1].value, censored=True)
