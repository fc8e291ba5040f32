"""The charts of a report, each from the recorded runs of one cell."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from specdef.audit.render.svg import Series, chart

Runs = Sequence[Mapping[str, Any]]
"""As `Run.to_dict` writes them; None stands for a loss that is not finite."""

SIDES = ("locked", "control", "scratch")
_DIVERGED = ("diverged", "failed")


def cell_charts(sides: Mapping[str, Runs], start: float | None) -> dict[str, Markup]:
    """Draw what is known of a cell.

    Args:
        sides: Runs of the locked side, of the control and of the from-scratch reference; any may be missing.
        start: Loss gains count from; None where it is not known.

    Returns:
        "rates": best loss against learning rate; "trials": best so far against trials; "losses": loss over steps of the
        best run of every seed.
    """
    return {
        "rates": chart(
            [_by_rate(side, sides[side]) for side in ("control", "locked") if sides.get(side)],
            title="Best held-out loss against learning rate", x_label="learning rate", y_label="best loss",
            log_x=True, start=start,
        ),
        "trials": chart(
            [s for side in ("control", "locked") for s in _so_far(side, sides.get(side, ()))],
            title="Best loss so far against trials", x_label="trial", y_label="best loss so far", start=start,
        ),
        "losses": chart(
            [s for side in ("scratch", "control", "locked") for s in _curves(side, sides.get(side, ()))],
            title="Held-out loss over steps, best run of each seed", x_label="step", y_label="loss", start=start,
            ceiling=_highest_start(sides, start),
        ),
    }  # fmt: skip


def _highest_start(sides: Mapping[str, Runs], start: float | None) -> float:
    """Return the highest loss before training; inf where none is finite."""
    first = [run["losses"][0] for runs in sides.values() for run in runs]
    known = [x for x in (*first, start) if x is not None and math.isfinite(x)]
    return max(known, default=math.inf)


def best_loss(run: Mapping[str, Any]) -> float:
    """Return the lowest loss of a run; inf where none is finite."""
    return min((x for x in run["losses"] if x is not None and math.isfinite(x)), default=math.inf)


def by_seed(runs: Runs) -> list[list[Mapping[str, Any]]]:
    """Split runs by seed, the lowest first; each seed's in the order of its trials."""
    found: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        found[run["seed"]].append(run)
    return [sorted(found[seed], key=lambda run: run["trial"]) for seed in sorted(found)]


def _rate(run: Mapping[str, Any]) -> float:
    return float(run["setting"]["learning_rate"])


def _by_rate(side: str, runs: Runs) -> Series:
    rates: dict[float, list[float]] = defaultdict(list)
    crossed = []
    for run in runs:
        rates[_rate(run)].append(best_loss(run))
        if run["status"] in _DIVERGED:
            crossed.append((_rate(run), best_loss(run)))
    points = tuple((rate, fmean(losses)) for rate, losses in sorted(rates.items()))
    return Series(label=side, kind=side, points=points, crossed=tuple(crossed))


def _so_far(side: str, runs: Runs) -> list[Series]:
    found = []
    for own in by_seed(runs):
        best, points = math.inf, []
        for number, run in enumerate(own, start=1):
            best = min(best, best_loss(run))
            points.append((float(number), best))
        found.append(Series(label=f"{side}, seed {own[0]['seed']}", kind=side, points=tuple(points)))  # fmt: skip
    return found


def _curves(side: str, runs: Runs) -> list[Series]:
    found = []
    for own in by_seed(runs):
        best = min(own, key=best_loss)
        points = tuple(
            (float(step), math.inf if loss is None else float(loss))
            for step, loss in zip(best["steps"], best["losses"], strict=True)
        )
        label = f"{side}, seed {best['seed']}, rate {_rate(best):.3g}"
        found.append(Series(label=label, kind=side, points=points))
    return found
