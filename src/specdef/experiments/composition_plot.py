"""Drawing of the composition experiment: what every attack recovers from every lock, a panel per net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from specdef.experiments.lock_table import UNLOCKED, cell_text


def draw(nets: Mapping[str, Sequence[Mapping[str, Any]]], locks: Sequence[str]) -> Figure:
    """Draw attacks by locks as maps of colours with the numbers in them.

    Args:
        nets: Name of a net to its cells, of `summarise`.
        locks: Names of the locks.

    Returns:
        The figure.
    """
    names = {
        net: [c["attack"] for c in cells if c["lock"] == UNLOCKED] for net, cells in nets.items()
    }
    most = max(map(len, names.values()))
    figure = Figure(figsize=(6.5 * len(nets), 0.5 * most + 2.5), layout="constrained")
    axes = figure.subplots(1, len(nets), squeeze=False)[0]
    for axis, (net, cells) in zip(axes, nets.items(), strict=True):
        found = {(c["attack"], c["lock"]): c["recovered"] for c in cells}
        values = np.full((len(names[net]), len(locks)), np.nan)
        for i, attack in enumerate(names[net]):
            for j, lock in enumerate(locks):
                entry = found.get((attack, lock))
                if entry:
                    values[i, j] = entry["mean"]
                axis.text(j, i, cell_text(entry), ha="center", va="center", fontsize=8)
        image = axis.imshow(values, vmin=0, vmax=1, cmap="RdYlGn_r", alpha=0.75, aspect="auto")
        axis.set_yticks(range(len(names[net])), names[net])
        axis.set_xticks(range(len(locks)), [lock.replace(" on ", "\non ") for lock in locks])
        axis.set_title(net)
    figure.colorbar(image, ax=list(axes), label="recovered share of\nthe control's gain")  # fmt: skip
    return figure
