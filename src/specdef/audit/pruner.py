"""When a run of a sweep is given up: it blew up, or it cannot become the best any more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

BLOWN = 1.0
"""A loss above the starting loss by this share of it, and not falling, is given up …"""

GRACE = 0.25
"""… after this share of the steps: on small tasks a large rate may wreck the model and train it anew from there."""

FASTER = 2.0
"""From now on a run may fall so many times as fast as in the best stretch of the later half of its steps so far."""

MARGIN = 0.1
"""A run is given up only if even then it stays above the best by this share of the best's gain."""


def hopeless(
    losses: Mapping[int, float],
    best: Sequence[Mapping[int, float]],
    *,
    start: float,
    initial: float,
    steps: int,
) -> bool:
    """Tell whether a run cannot become the best of its sweep.

    Losses of stable training fall ever more slowly, so a stretch that has passed bounds what follows; `FASTER` and `MARGIN`
    leave room for noise. A run is compared with finished runs only, at the same step.

    Args:
        losses: Loss after each measured step, the last one now.
        best: The same of the finished runs of the sweep.
        start: Loss the gain counts from.
        initial: Loss before the first step, or a bound above it. An attack's own edits may have raised it: a first loss above
            it tells nothing, the next ones are held against that.
        steps: Steps of a whole run.

    Returns:
        Whether to give it up.
    """
    now = max(losses)
    if now >= steps:
        return False  # nothing is left to be saved
    loss = losses[now]
    before = [s for s in losses if s < now]
    if not math.isfinite(loss):
        return True
    if not before and loss > initial:
        return False
    previous = losses[max(before)] if before else initial
    if loss > blown(initial):
        return now >= GRACE * steps and loss >= previous
    rivals = [b for b in best if now in b and max(b) >= steps]
    if not rivals:
        return False
    rival = min(rivals, key=lambda b: min(b.values()))
    goal = min(rival.values())
    if start - goal <= 0 or rival[now] >= loss:
        return False
    points = sorted(losses.items())
    if points[0][1] <= initial:
        points.insert(0, (0, initial))
    slope = max((a[1] - b[1]) / (b[0] - a[0]) for a, b in pairwise(points) if b[0] > now / 2)
    reach = min(loss, initial) - FASTER * max(slope, 0.0) * (steps - now)
    return reach > goal + MARGIN * (start - goal)


def blown(initial: float) -> float:
    """Return the loss above which a run that does not fall is given up."""
    return initial + BLOWN * abs(initial)


class SweepPruner(BasePruner):
    """Gives up runs that cannot become the best of a sweep of learning rates.

    Args:
        start: Loss the gain counts from.
        initial: Loss before the first step, or a bound above it.
        steps: Steps of a whole run.
    """

    def __init__(self, start: float, initial: float, steps: int) -> None:
        self._start = start
        self._initial = initial
        self._steps = steps

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Judge a running trial.

        Args:
            study: Its study.
            trial: The trial, with what it has reported.

        Returns:
            Whether it should end.
        """
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best = [t.intermediate_values for t in finished if t.intermediate_values]
        return hopeless(
            trial.intermediate_values,
            best,
            start=self._start,
            initial=self._initial,
            steps=self._steps,
        )
