"""Which learning rate to try next: walk by decades to both ends, then refine where it matters. Knows no optimiser and no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

PER_DECADE = 4
"""Rates are whole powers of 10^(1/4): a decade is four steps, half a decade two."""

NOTHING = 0.01
"""Below this share of the gain it is measured against, a rate has moved nothing."""

NOISE = 1e-4
"""Below this share of the starting loss no gain counts."""

WRECKED = 0.05
"""Above the starting loss by this share without a gain, a run has diverged though its loss is finite."""

LOWEST = 1e-40
"""Where a walk down ends at last: below, a rate itself is lost in float32. A lock of scale 2^52 lets SGD train at 1e-37 and less."""

ABOVE = 1e4
"""A walk up ends this far above the ordinary range: beyond, a method that never diverges does not depend on its rate."""

HIGHEST = 1e9
"""Where a walk up ends at last, though nothing has moved yet: a lock may make gradients small instead of large."""

CLIMB = 2
"""A search around a known best goes up by so many decades at most."""

Outcome = Literal["running", "moved", "nothing", "diverged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One rate, and what came of it.

    Args:
        rate: The learning rate.
        running: Another worker is at it; the rest is not known yet.
        start: Loss the gain counts from.
        initial: Loss a run that takes no steps has where this one ends: that before the first step, but for running
            statistics of batch norms, which move at any rate.
        lowest: The lowest loss of such a run up to there; None takes `initial`.
        best: Lowest loss.
        last: Last loss; inf where it was not finite.
        diverged: The run ended because its numbers did, or was given up on.
        still: No stored weight changed. Of a lock's scaled channels few may change, where nearly all others round to what they were.
        share: Share of the budget's steps that were run.
    """

    rate: float
    running: bool = False
    start: float = 1.0
    initial: float = 1.0
    lowest: float | None = None
    best: float = 1.0
    last: float = 1.0
    diverged: bool = False
    still: bool = False
    share: float = 1.0

    @property
    def gain(self) -> float:
        """By how much the lowest loss is below the start; 0 where it is not."""
        return max(0.0, self.start - self.best)

    @property
    def idle(self) -> float:
        """Lowest loss without steps."""
        return self.initial if self.lowest is None else self.lowest


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Where a sweep begins and how fine it becomes.

    Args:
        low: Lowest rate that is ordinary for the optimiser.
        high: Highest.
        rates: Only these rates, in this order; empty searches.
        around: Search around this rate only, at half a decade, as far as it gets better: for the other seeds of a sweep
            that has found both ends. None searches for the ends.
        gain: Gain of the control: what moves less than `NOTHING` of it moves nothing. None measures against the best of
            the sweep itself.
        max_trials: Runs at most.
        refine: Half and quarter decades around the best; otherwise whole decades alone.
        stride: Decades between rates below the ordinary range, at first: a lock of scale 2^48 diverges down to 1e-28. Whole decades follow
            beside the best rate and at every edge of stability.
    """

    low: float = 1e-5
    high: float = 1e-2
    rates: tuple[float, ...] = ()
    around: float | None = None
    gain: float | None = None
    max_trials: int = 100
    refine: bool = True
    stride: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(f"low must be in 0..high, got {self.low} and {self.high}.")
        for name in ("max_trials", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def rate_at(index: int) -> float:
    """Return the rate with an index on the grid.

    Args:
        index: Quarter decades above 1.

    Returns:
        10^(index / 4), to three digits, so that it prints as it is.

    >>> [rate_at(i) for i in (-16, -14, -13, 0)]
    [0.0001, 0.000316, 0.000562, 1.0]
    """
    return float(f"{10 ** (index / PER_DECADE):.3g}")


def index_of(rate: float) -> int:
    """Return the index of the rate on the grid that is nearest."""
    return round(PER_DECADE * math.log10(rate))


def next_rate(trials: Sequence[Tried], sweep: Sweep) -> float | None:
    """Say which learning rate to try next.

    From the upper part of the ordinary range, so that runs at low rates have something to be behind of, a sweep walks by decades: over the whole range, up until it diverges above it, and
    down until nothing moves. A lower rate than one that moves nothing moves less, but below one that diverges there may
    be anything: a lock of scale 2^40 diverges down to 1e-11. Then half decades beside the best and at the edge of stability
    above it, and at last a quarter.

    Args:
        trials: What was tried, running trials among them, in any order. The answer is a function of these alone.
        sweep: The configuration.

    Returns:
        A rate that was not tried; None if there is none to try, for good where no trial is running.
    """
    if len(trials) >= sweep.max_trials:
        return None
    if sweep.rates:
        done = {t.rate for t in trials}
        return next((rate for rate in sweep.rates if rate not in done), None)
    tried = {index_of(t.rate): t for t in trials}
    kinds = dict(zip(tried, outcomes(list(tried.values()), sweep), strict=True))
    if sweep.around is not None:
        index = _climb(tried, kinds, index_of(sweep.around))
    else:
        index, open_end = _walk(kinds, sweep)
        if index is None and not open_end:
            index, open_end = _fill(tried, kinds)
        if index is None and not open_end and sweep.refine:
            index = _refine(tried, kinds)
    return None if index is None else rate_at(index)


def outcomes(trials: Sequence[Tried], sweep: Sweep) -> list[Outcome]:
    """Say what became of every trial, each measured against the best.

    Args:
        trials: All trials of a sweep.
        sweep: Its `gain` is used.

    Returns:
        One outcome for each trial. "nothing": no weight moved, or a gain too small to count, without damage. "diverged": no
        gain, and a loss far above the start.
    """
    reference = sweep.gain
    if reference is None:
        reference = max((t.gain for t in trials if not t.running), default=0.0)
    found: list[Outcome] = []
    for t in trials:
        threshold = max(NOTHING * reference, NOISE * abs(t.start))
        if t.running:
            found.append("running")
        elif t.diverged:
            found.append("diverged")
        elif t.still:
            found.append("nothing")
        elif t.gain < threshold and t.last > t.initial + WRECKED * abs(t.initial):
            found.append("diverged")
        elif (t.idle - t.best) / t.share < threshold > t.last - t.initial:
            found.append("nothing")
        else:
            found.append("moved")
    return found


def best_index(tried: Mapping[int, Tried], kinds: Mapping[int, Outcome]) -> int | None:
    """Return the index with the lowest loss, the lowest such index; where nothing moved, the highest stable one.

    Args:
        tried: Trials by index.
        kinds: Their outcomes.

    Returns:
        An index; None where all diverged or run.
    """
    moved = [k for k, kind in kinds.items() if kind != "running" and tried[k].gain > 0]
    if any(kinds[k] == "moved" for k in moved):
        return min(moved, key=lambda k: (tried[k].best, k))
    return max((k for k, kind in kinds.items() if kind in ("moved", "nothing")), default=None)


def _walk(kinds: Mapping[int, Outcome], sweep: Sweep) -> tuple[int | None, bool]:
    """Return the next decade, and whether an end waits for a running trial."""
    low = PER_DECADE * math.floor(math.log10(sweep.low) + 1e-9)
    high = PER_DECADE * math.ceil(math.log10(sweep.high) - 1e-9)
    first = PER_DECADE * ((low + 2 * high) // (3 * PER_DECADE))
    if first not in kinds:
        return first, True
    decades = [k for k in kinds if k % PER_DECADE == 0]
    top, bottom = max(decades), min(decades)
    up = top < high or (kinds[top] == "moved" or kinds[top] == "nothing")
    ceiling = high + PER_DECADE * math.log10(ABOVE)
    up = up and top < (index_of(HIGHEST) if kinds[top] == "nothing" else ceiling)
    down = kinds[bottom] not in ("nothing", "running") and bottom > index_of(LOWEST)
    if up:
        return top + PER_DECADE, True
    if down:
        stride = sweep.stride if bottom <= low else 1
        return max(bottom - PER_DECADE * stride, index_of(LOWEST)), True
    if kinds[bottom] == "running" and bottom > low:
        return bottom - PER_DECADE, True  # a part of the range that is tried in any case
    return None, "running" in (kinds[top], kinds[bottom])


def _fill(tried: Mapping[int, Tried], kinds: Mapping[int, Outcome]) -> tuple[int | None, bool]:
    """Return a decade that the walk's stride has left out where it matters, and whether that waits for a running trial."""
    best = best_index(tried, kinds)
    waits = False
    for below, over in pairwise(sorted(kinds)):
        if over - below <= PER_DECADE:
            continue
        if "running" in (kinds[below], kinds[over]):
            waits = True
        elif best in (below, over) or (kinds[below] == "diverged") != (kinds[over] == "diverged"):
            return below + (over - below) // (2 * PER_DECADE) * PER_DECADE, True
    return None, waits


def _refine(tried: Mapping[int, Tried], kinds: Mapping[int, Outcome]) -> int | None:
    best = best_index(tried, kinds)
    if best is None:
        return None
    half = PER_DECADE // 2
    for side, end in ((1, max(kinds)), (-1, min(kinds))):
        if best != end and not any(best + side * step in kinds for step in range(1, half + 1)):
            return best + side * half
    if any(kinds.get(best + step) == "running" for step in range(-half, half + 1)):
        return None  # its results decide which side is the better one
    ordered = sorted(kinds)
    for below, over in pairwise(ordered):
        stops = kinds[over] == "diverged" and kinds[below] in ("moved", "nothing")
        if over < best and stops and over - below > half:
            return (below + over) // 2  # the edge of another window of rates, below this one
    above = [k for k in ordered if k > best]
    edge = next((k for k in above if kinds[k] == "diverged"), None)
    if edge is not None:
        stable = max(k for k in kinds if k < edge)
        # The best may lie just below the edge; a gap further up holds nothing that the best does not.
        if stable - best <= half and edge - stable > 1:
            return (edge + stable) // 2
    if kinds[best] != "moved" or best + 1 in kinds or best - 1 in kinds:
        return None
    return best + 1 if _loss(tried, best + half) < _loss(tried, best - half) else best - 1


def _loss(tried: Mapping[int, Tried], index: int) -> float:
    return tried[index].best if index in tried else math.inf


def _climb(tried: Mapping[int, Tried], kinds: Mapping[int, Outcome], centre: int) -> int | None:
    half = PER_DECADE // 2
    for index in (centre, centre + half, centre - half):
        if index not in kinds:
            return index
    best = best_index(tried, kinds)
    if best is None:  # everything diverged: this seed's edge lies lower
        lowest = min(kinds)
        return lowest - half if kinds[lowest] != "running" and lowest > index_of(LOWEST) else None
    top = (
        centre + CLIMB * PER_DECADE
    )  # where nothing moves, the highest stable rate counts as the best
    return next((k for k in (best + half, best - half) if k not in kinds and k <= top), None)
