"""The exponent of a growing curve, on a window that a rule chooses and no eye."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from scipy.special import stdtrit  # type: ignore[import-untyped]

_LEAST_POINTS, _LEAST_SPAN, _RMS = 5, math.log(4) - 1e-9, 0.05


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentFit:
    """A power law fitted to the observed alignment loss.

    Args:
        value: Exponent of time.
        low: Lower end of its 95 % interval.
        high: Upper end.
        window: First and last step of the window.
        num_points: Points in it.
        rms: Root mean square of the residuals of log A.
        is_power_law: Whether a window was found on which a power law fits; otherwise the fit is over all points allowed.
        predicted: The forecast's exponent on the same steps; None where there is none.
    """

    value: float
    low: float
    high: float
    window: tuple[int, int]
    num_points: int
    rms: float
    is_power_law: bool
    predicted: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "value": self.value, "low": self.low, "high": self.high, "window": list(self.window),
            "num_points": self.num_points, "rms": self.rms, "is_power_law": self.is_power_law,
            "predicted": self.predicted,
        }  # fmt: skip


def fit_exponent(
    steps: Sequence[int],
    values: Sequence[float],
    *,
    floor: float = 0.0,
    ceiling: float = math.inf,
    last_step: float = math.inf,
    clocks: tuple[Sequence[float], Sequence[float]] | None = None,
    forecast: Sequence[float] | None = None,
) -> ExponentFit | None:
    """Fit A = c T^k where a power law holds.

    Allowed are the steps from the second on, up to `last_step`, whose value lies between floor and ceiling. Of all windows
    of at least 5 neighbouring points that span at least a factor of 4 in time, the widest is taken on which log A leaves
    residuals of at most 0.05 root mean square; of equally wide ones the earlier. Where there is none the fit is over all
    points allowed, and says so.

    Time T is counted as the law that fits better counts it: to first order, n for gradient descent, or to second,
    sqrt(n (n - 1)), since a method in steps has done n (n - 1) / 2 where the flow has t^2 / 2. With the wrong one of the
    two the exponent of few steps is off by some per cent.

    Args:
        steps: Step numbers, ascending.
        values: The curve.
        floor: Values below it are rounding.
        ceiling: Values above it have left the law.
        last_step: Steps beyond it have left the law.
        clocks: s and r of every step, see `path.clocks`; None for gradient descent.
        forecast: A forecast on the same steps, whose exponent on the same window is `predicted`.

    Returns:
        The fit, with a 95 % interval by Student's t on the residuals; None for fewer than 3 points allowed.

    Example:
        >>> steps = [2, 4, 8, 16, 32, 64]
        >>> fit = fit_exponent(steps, [1e-9 * n**2 for n in steps])
        >>> round(fit.value, 6), fit.window, fit.is_power_law
        (2.0, (2, 64), True)
    """
    n = np.asarray(steps, dtype=float)
    s, r = (n, n * (n - 1) / 2) if clocks is None else (np.asarray(c, dtype=float) for c in clocks)
    A = np.asarray(values, dtype=float)
    with np.errstate(invalid="ignore"):
        kept = (n >= 2) & (n <= last_step) & (max(floor, 0) < A) & (ceiling >= A) & (r > 0)
    inside = np.flatnonzero(kept)
    if len(inside) < 3:
        return None
    best: tuple[tuple[bool, float, float], Line, np.ndarray, np.ndarray] | None = None
    for time in (np.log(s[inside]), np.log(2 * r[inside]) / 2):
        start, stop, found = _widest(inside, time, np.log(A[inside]))
        line = fit_line(time[start:stop], np.log(A[inside][start:stop]))
        key = (found, float(np.log(n[inside[stop - 1]] / n[inside[start]])), -line.rms)
        if best is None or key > best[0]:
            best = key, line, inside[start:stop], time[start:stop]
    assert best is not None
    (found, _, _), line, window, time = best
    predicted = None
    if forecast is not None:
        f = np.asarray(forecast, dtype=float)[window]
        if bool((np.isfinite(f) & (f > 0)).all()):
            predicted = fit_line(time, np.log(f)).slope
    return ExponentFit(
        value=line.slope,
        low=line.slope - line.half_width,
        high=line.slope + line.half_width,
        window=(int(n[window[0]]), int(n[window[-1]])),
        num_points=len(window),
        rms=line.rms,
        is_power_law=found,
        predicted=predicted,
    )


@dataclass(frozen=True, slots=True)
class Line:
    """A line fitted by least squares: its slope, half its 95 % interval, and the root mean square of the residuals."""

    slope: float
    half_width: float
    rms: float


def fit_line(x: np.ndarray, y: np.ndarray) -> Line:
    """Fit a line by least squares.

    Args:
        x: `[k]`, at least two of them different.
        y: `[k]`.

    Returns:
        The line; its interval is NaN for two points.
    """
    # Sums and no products of BLAS, whose last digit depends on where in memory the numbers lie.
    centred = x - x.mean()
    spread = float((centred**2).sum())
    slope = float((centred * y).sum()) / spread
    squares = float(((y - y.mean() - slope * centred) ** 2).sum())
    count = len(x)
    rms = math.sqrt(squares / count)
    if count < 3:
        return Line(slope, math.nan, rms)
    error = math.sqrt(squares / (count - 2) / spread)
    return Line(slope, float(stdtrit(count - 2, 0.975)) * error, rms)


def _widest(inside: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[int, int, bool]:
    """Return begin and end of the widest window on which a line fits, and whether there is one; else all."""
    windows = [
        (i, j)
        for i in range(len(x))
        for j in range(i + _LEAST_POINTS, len(x) + 1)
        # Neighbours on the grid: a point that is not allowed ends a window.
        if inside[j - 1] - inside[i] == j - 1 - i and x[j - 1] - x[i] >= _LEAST_SPAN
    ]
    for i, j in sorted(windows, key=lambda w: (x[w[0]] - x[w[1] - 1], w[0])):
        if fit_line(x[i:j], y[i:j]).rms <= _RMS:
            return i, j, True
    return 0, len(x), False
