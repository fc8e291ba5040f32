"""Where the first step already fails: a line search in the true loss, by forward passes alone.

An adaptive method's first step is lr times a known direction (Adam: the sign of the gradient), and it is the largest of
the run in units of the gradient that it sees, since the second moment has no memory yet. The largest rate with which that
step does not raise the loss is close to the largest with which a run stays below its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_OCTAVES = 60


def largest_step(change: Callable[[float], float], guess: float, *, tol: float = 1.1) -> float:
    """Find the largest rate at which a step along a fixed direction does not raise the loss.

    Doubles or halves from the guess until the sign turns, then bisects; along a line on which the loss falls again
    beyond a rise, it finds one of the crossings near the guess.

    Cost: some 6 evaluations with a good guess, and one per octave that it is off.

    Args:
        change: Rate to change of the loss; infinite or NaN counts as a rise.
        guess: Positive and finite.
        tol: Ratio of the rates between which the answer lies at the end.

    Returns:
        The rate; inf where none within 60 octaves above the guess raises the loss, 0 where all within 60 below do.
    """

    def holds(rate: float) -> bool:
        return change(rate) <= 0

    low = high = guess
    if holds(guess):
        while holds(high := 2 * low):
            low = high
            if low > guess * 2.0**_OCTAVES:
                return math.inf
    else:
        while not holds(low := high / 2):
            high = low
            if high < guess * 2.0**-_OCTAVES:
                return 0.0
    while high / low > tol:
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
