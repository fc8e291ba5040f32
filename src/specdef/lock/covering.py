"""Exponents such that every natural part of a network has a site of its own, far above all others of that part.

Trained at learning rate lr a site of scale 2^e learns as the unlocked one at lr 2^e. The largest stable lr of whatever is
trained is set by its highest exponent E, and all else trains at most at 2^(e - E) of its own best rate. So what an
attacker gains is what the slices of the highest site give, and those are chosen to give nothing.

Layers: those of a balanced binary tree, the middle one on top, `gap` octaves from one level to the next. Of any run of
neighbouring layers, one and only one lies on the highest level among them, whether an attacker trains all layers, the
first ones, the last ones or a single one; n layers need log2(n + 1) levels.

Sides of a site: dividing a channel's readers by 2^e makes their column explosive and freezes the slice that writes the channel;
dividing its writer, on another channel, does the reverse. With both, whoever trains only the norms, or only the linear
layers, meets the lock as well. And neither tensor's norm tells what its steps should be: where one side alone is scaled,
the writer's norm is inflated, and rates relative to the norm of a tensor (Adafactor, LAMB) train it as if nothing were scaled.
Both sides of a site of exponents e and f explode at a relative rate of 2^-(e+f), and all else in both tensors moves
at at 2^-e or 2^-f of its own. Sites between linear layers are left one-sided where norms are at hand; their tree is that of the norms,
one layer on. A layer that is high in one is low in the other, and where there are too few layers for that the second tree is lowered as a
whole: where a column and a row cross that were both multiplied, an entry grows by 2^60 at most. (Its square would not fit float32
otherwise, and a rate relative to the norm of a tensor would be inf: no lock, since in float64 it is not.)

Within a layer the gains of norms lie `slack` octaves above the columns: a single number gives an attacker the least. Of the columns, those
of the site that comes first in a layer lie half a gap above the others, so that whoever trains all linear layers meets one column.

The layer on top of the tree is the last one with all kinds of sites: by trial on SmolLM2, what its slices give an attacker is least
(dev/LOG.md, 2026-11-22; `benchmarks/slices.py`). Below it the tree is balanced, so that this
costs at most one level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from specdef.lock.config import LockConfig
from specdef.symmetries.site import Site

Side = Literal["readers", "writers"]
"""What of a site becomes explosive: the slices that read a channel, or the one that writes it."""

ROOM = 60
"""Octaves by which an entry or a gradient may grow so that its square fits float32: beyond, Adam freezes it, and Adafactor ends in NaN."""

VECTORS = frozenset({"norm", "batchnorm", "stream"})
"""Kinds of sites whose writers are gains: vectors, of which a channel is one number."""


def depths(num_positions: int, root: int) -> list[int]:
    """Return the depth of every position in a binary tree read from left to right, balanced below its root.

    Args:
        num_positions: Number of positions.
        root: The position on top.

    Returns:
        Depths; in every run of neighbours the least one occurs once.

    >>> depths(7, 3)
    [2, 1, 2, 0, 2, 1, 2]
    >>> depths(4, 3)
    [2, 1, 2, 0]
    """
    found = [0] * num_positions

    def fill(low: int, high: int, depth: int) -> None:
        if low < high:
            middle = (low + high) // 2
            found[middle] = depth
            fill(low, middle, depth + 1)
            fill(middle + 1, high, depth + 1)

    fill(0, root, 1)
    fill(root + 1, num_positions, 1)
    return found


def covering(sites: Sequence[Site], config: LockConfig) -> list[tuple[Site, Side, int]]:
    """Return what is scaled, and by which power of two.

    Args:
        sites: The sites, in the order of the network.
        config: Its scale, min_scale, gap, slack and sides are used.

    Returns:
        Site, side and exponent, the highest exponents first.
    """
    low, high = round(math.log2(config.bottom)), round(math.log2(config.top))
    layers: dict[str | int, list[Site]] = {}
    for site in sites:
        layers.setdefault(_position(site), []).append(site)
    kinds = [len({site.kind for site in members}) for members in layers.values()]
    root = max(i for i, count in enumerate(kinds) if count == max(kinds))
    depth = depths(len(layers), root)
    # Of the sites between linear layers none comes behind the last of them, though a norm may.
    between = [any(site.kind not in VECTORS for site in members) for members in layers.values()]
    behind = [d if any(between[i:]) else max(depth) + 1 for i, d in enumerate([*depth[1:], 0], 1)]
    vectors = config.both_sides and any(site.kind in VECTORS for site in sites)
    # Without vectors, in every matrix a scaled row of one site crosses a scaled column of the next.
    if config.both_sides and not vectors:
        high = max(min(high, (ROOM + config.gap) // 2), low)
    found: list[tuple[Site, Side, int]] = []
    inner: list[tuple[Site, int]] = []
    crossing = 0
    for index, members in enumerate(layers.values()):
        top, second = (high - config.gap * tree[index] for tree in (depth, behind))
        for number, site in enumerate(members):
            below = (config.slack if vectors else 0) + (config.gap // 2 if number else 0)
            if vectors and site.kind not in VECTORS:
                inner.append((site, second - below))
                crossing = max(crossing, top + second - below)
                continue
            found.append((site, "readers", max(top - below, low)))
            if config.both_sides:
                found.append((site, "writers", max(top if vectors else top - below, low)))
    excess = max(crossing - ROOM, 0)
    found += [(site, "readers", max(column - excess, low)) for site, column in inner]
    return sorted(found, key=lambda item: -item[2])


def _position(site: Site) -> str | int:
    """Return the layer a site belongs to; outside the layers it stands for itself."""
    return site.name if site.layer is None else site.layer
