"""How the outputs on aligned data accelerate along the path: the whole constant of the law, by forward passes alone.

Along phi(t) = -t g + t^2 / 2 H g the outputs are

    z(t) = z(0) - t J g + t^2 / 2 w + O(t^3),   w = J H g + f''(g, g),

f'' their second derivative: the sensitive subspace turns as the weights move. Where J g = 0, A(t) = |w|_B^2 t^4 / 8 to
leading order. gamma has the first term of w within the subspace, and nothing of the second.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specdef.fragility.alignment import AlignmentLoss
from specdef.fragility.path import QuadraticPath
from specdef.fragility.task import Metric

# What the roundings of z(t), z(-t) and 2 z(0) come to, where they are independent.
_ROUNDINGS = math.sqrt(6)


def output_acceleration(
    alignment: AlignmentLoss,
    path: QuadraticPath,
    metric: Metric,
    *,
    matrix: Tensor,
    largest: float,
    floor: float,
    horizon: float,
) -> tuple[float, float]:
    """Measure |w|_B by second differences at two times, (z(t) + z(-t) - 2 z(0)) / t^2 = w + O(t^2), and remove the O(t^2).

    An error of rounding rho / (t^2 |w|) and one of (t / tau)^4, tau the time in which path or outputs change by as much as they
    are, balance at t^6 = rho tau^4 / |w|. The first time takes |J H g|_B for |w|_B, the second what was found at the first.

    Cost: four forward passes over the aligned data. Memory: the outputs of all counted terms, twice.

    Args:
        alignment: The alignment loss.
        path: The path, in the metric's coordinates.
        metric: The metric.
        matrix: Q F Q^T `[m, m]`, F on the path's basis.
        largest: Largest eigenvalue of F.
        floor: Rounding floor of the alignment loss, as `AlignmentLoss.rounding_floor` gives it.
        horizon: Time of the planned steps, taken where nothing else has a time.

    Returns:
        |w|_B, and how far it is off: what the second time changes, and rounding. NaN where outputs are not finite.
    """
    g = matrix.new_zeros(len(matrix))
    g[0] = path.gradient_norm
    Hg = path.coupling()
    size = alignment.seminorm()
    eps = torch.finfo(path.basis.dtype).eps
    at_start = max(math.sqrt(floor / 2), size * eps)
    bend = _over(float(g.norm()), float(Hg.norm()))
    first, second = (math.sqrt(max(0.0, float(c @ matrix @ c))) for c in (g, Hg))

    def rounding(t: float) -> float:
        # what the displacement moves through F's steepest direction cancels only to its last digit
        return at_start + eps * math.sqrt(largest) * t * path.gradient_norm

    def time(w: float) -> float:
        # outputs that are all zero have no size to go by
        scales = (bend, _over(size, first), math.sqrt(_over(size, w))) if size else (bend,)
        tau = min(scales)
        tau = tau if tau < math.inf else horizon
        return tau * math.pow(min(1.0, _over(rounding(tau), w * tau**2)), 1 / 6)

    def look(t: float) -> list[Tensor]:
        forth, back = (metric.scale(path.displacement(t**2 / 2 * Hg - s * g)) for s in (t, -t))
        return [rows / t**2 for rows in alignment.second_difference(forth, back)]

    times = [time(second)]
    looks = [look(times[0])]
    found = alignment.seminorm(looks[0])
    if not math.isfinite(found):
        return math.nan, math.nan
    # Half or twice at least, else the two would say the same.
    other = time(found)
    times.append(2 * times[0] if other > times[0] else min(other, times[0] / 2))
    looks.append(look(times[1]))
    (t, near), (longer, far) = sorted(zip(times, looks, strict=True), key=lambda pair: pair[0])
    share = 1 / ((longer / t) ** 2 - 1)
    for a, b in zip(near, far, strict=True):
        b.sub_(a).mul_(-share)
        a.add_(b)
    error = alignment.seminorm(far) + (1 + share) * _ROUNDINGS * rounding(t) / t**2
    return alignment.seminorm(near), error


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else math.inf
