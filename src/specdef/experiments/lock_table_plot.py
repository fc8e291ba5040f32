"""Drawings of the tables of attacks by locks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from specdef.experiments.lock_table import UNLOCKED, cell_text


def draw_accuracies(
    cells: Sequence[Mapping[str, Any]], columns: Sequence[str], scratch: Mapping[str, Any] | None, earlier: Mapping[tuple[str, str], str]
) -> Figure:  # fmt: skip
    """Draw attacks by locks as a map of colours with the numbers in it.

    Args:
        cells: Of `summarise`.
        columns: Locks, the unlocked model first.
        scratch: Accuracy of fresh weights.
        earlier: (attack, column) to what was measured before.

    Returns:
        The figure.
    """
    attacks = [c["attack"] for c in cells if c["lock"] == UNLOCKED]
    found = {(c["attack"], c["lock"]): c["accuracy"] for c in cells}
    figure = Figure(figsize=(2.2 * len(columns) + 2, 0.42 * len(attacks) + 2), layout="constrained")
    axis = figure.subplots()
    values = np.full((len(attacks), len(columns)), np.nan)
    for i, attack in enumerate(attacks):
        for j, column in enumerate(columns):
            entry = found.get((attack, column))
            if entry:
                values[i, j] = entry["mean"]
            text = cell_text(entry, earlier.get((attack, column)))
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color="black")
    image = axis.imshow(values, vmin=0.1, vmax=1, cmap="RdYlGn_r", alpha=0.75, aspect="auto")
    figure.colorbar(image, label="best accuracy on the new task, mean over seeds")
    axis.set_yticks(range(len(attacks)), attacks)
    axis.set_xticks(range(len(columns)), [c.replace(", ", ",\n") for c in columns], fontsize=8)
    fresh = f"; from scratch with AdamW {cell_text(scratch)}" if scratch else ""
    axis.set_title(f"mean ± half of the 95 % interval [measured before, one seed]{fresh}", fontsize=9)  # fmt: skip
    return figure


def draw_sweeps(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], start: float) -> Figure:
    """Draw the best loss of every run over its learning rate, one panel per attack, one line per lock.

    Args:
        rows: Of `audit_rows`, each once.
        columns: Names of the lines.
        start: Loss before any attack.

    Returns:
        The figure.
    """
    attacks = list(dict.fromkeys(row["attack"] for row in rows if row["lock"] in columns))
    figure = Figure(figsize=(6.5 * len(attacks), 4.6), layout="constrained")
    axes = figure.subplots(1, len(attacks), sharey=True, squeeze=False)[0]
    for axis, attack in zip(axes, attacks, strict=True):
        for colour, column in enumerate(columns):
            part = [r for r in rows if (r["attack"], r["lock"]) == (attack, column)]
            for k, row in enumerate(part):
                points = [(rate, loss) for rate, _, _, loss, _ in row["runs"] if math.isfinite(loss)]  # fmt: skip
                axis.plot(*zip(*points, strict=True), "o-", ms=3, color=f"C{colour}", label="" if k else column)  # fmt: skip
        axis.axhline(start, color="k", ls=":", lw=1)
        axis.set(xscale="log", xlabel="learning rate", title=attack)
    axes[0].set_ylabel("best held-out loss, nats per token (dotted: before the attack)")
    axes[0].legend(fontsize=8)
    return figure
