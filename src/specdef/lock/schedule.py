"""How exponents are spread over sites, from the least useful site (rank 0) to the most useful one."""

from __future__ import annotations

import math

from specdef.lock.config import LockConfig


def exponents(num_sites: int, config: LockConfig) -> list[int]:
    """Return the exponent of every rank.

    uniform: hi. staggered: linear from hi to lo. convex: lo + (hi - lo) (1 - rank / (n - 1))^power, which leaves one or
    two sites in the window of some seven octaves below the largest stable one, where an attacker's steps do anything
    at all (FACTS 3).

    Args:
        num_sites: Number of sites.
        config: Its scale, min_scale, schedule and power are used.

    Returns:
        Exponents of two, falling.

    >>> exponents(4, LockConfig(scale=2**20, min_scale=2**8, schedule="staggered"))
    [20, 16, 12, 8]
    >>> exponents(4, LockConfig(scale=2**20, min_scale=2**8, schedule="convex"))
    [20, 8, 8, 8]
    """
    low, high = round(math.log2(config.bottom)), round(math.log2(config.top))
    if config.schedule == "uniform":
        return [high] * num_sites
    power = 1 if config.schedule == "staggered" else config.power
    fall = [(1 - rank / max(num_sites - 1, 1)) ** power for rank in range(num_sites)]
    return [low + round((high - low) * f) for f in fall]
