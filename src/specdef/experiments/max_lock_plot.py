"""Drawing of the table of lock designs, and of the forecast against what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from specdef.experiments.lock_table import Rows, cell_text


def draw(
    cells: Rows, tasks: Sequence[str], designs: Sequence[str], numbers: Mapping[str, Mapping[str, Any]]
) -> Figure:  # fmt: skip
    """Draw shares recovered as a map of colours for each task, and the forecast against the measurement.

    Args:
        cells: Of `cells_of`.
        tasks: Names of the tasks.
        designs: The columns.
        numbers: Of `correlations`.

    Returns:
        The figure.
    """
    attacks = list(dict.fromkeys(c["attack"] for c in cells if c["lock"] in designs))
    width = 1.3 * len(designs) + 2.4
    figure = Figure(figsize=(width * len(tasks) + 5, 0.36 * len(attacks) + 2), layout="constrained")
    *maps, scatter = figure.subplots(1, len(tasks) + 1, width_ratios=[width] * len(tasks) + [5])
    for axis, task in zip(maps, tasks, strict=True):
        found = {(c["attack"], c["lock"]): c["recovered"] for c in cells if c["task"] == task}
        values = np.full((len(attacks), len(designs)), np.nan)
        for i, attack in enumerate(attacks):
            for j, design in enumerate(designs):
                entry = found.get((attack, design))
                values[i, j] = entry["mean"] if entry else np.nan
                axis.text(j, i, cell_text(entry, digits=3), ha="center", va="center", fontsize=7)
        axis.imshow(values, vmin=0, vmax=1, cmap="RdYlGn_r", alpha=0.75, aspect="auto")
        axis.set_yticks(range(len(attacks)), attacks, fontsize=8)
        axis.set_xticks(range(len(designs)), [d.replace(", ", ",\n") for d in designs], fontsize=8)
        axis.set_title(f"{task}: share of the unlocked gain recovered", fontsize=9)
    for colour, (name, part) in enumerate(numbers.items()):
        label = f"{name}: " + (
            f"Spearman {part['spearman']:.2f}, Pearson {part['pearson']:.2f} ({part['cells']} cells)"
            if part["spearman"] is not None
            else f"{part['cells']} cells"
        )
        x, y = ([p[n] for p in part["points"]] for n in ("predicted", "measured"))
        scatter.scatter(x, y, s=14, color=f"C{colour}", alpha=0.8, label=label)
    scatter.set(xlabel="forecast slowdown", ylabel="measured")
    if any(part["points"] for part in numbers.values()):  # a table of some rows may have none
        scatter.set(xscale="log", yscale="log")
    scatter.legend(fontsize=7)
    return figure
