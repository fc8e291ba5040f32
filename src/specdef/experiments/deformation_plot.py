"""The drawing of the deformation experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def draw(rows: Sequence[dict[str, Any]], floor: float, wanted: float) -> Figure:
    """Draw accuracy and singular values over the lock, and the growth of every matrix.

    Args:
        rows: One per seed, as in the record.
        floor: Accuracy that is asked of the locked model.
        wanted: Growth that is asked.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    accuracy, sigma, matrices = figure.subplots(1, 3)
    for i, row in enumerate(rows):
        history, test, colour = row["history"], row["test"], f"C{i}"
        steps = [s["step"] for s in history]
        accuracy.plot(
            steps,
            [s["utility"] for s in history],
            "-",
            color=colour,
            label=f"held out, seed {row['seed']}",
        )
        kept = row["lock"]["kept_step"]
        accuracy.plot(
            [0, kept], [test["accuracy_before"], test["accuracy_after"]], "s", color=colour, ms=5
        )
        sigma.plot(
            steps,
            [s["sigma_max"] for s in history],
            "-",
            color=colour,
            label=f"largest, seed {row['seed']}",
        )
        sigma.plot(steps, [s["median_growth"] for s in history], ":", color=colour)
        matrices.plot(
            [m["growth"] for m in row["matrices"]],
            "o",
            color=colour,
            ms=4,
            label=f"seed {row['seed']}",
        )
    accuracy.plot([], [], "ks", ms=5, label="test, before and after")
    accuracy.axhline(floor, color="0.4", ls="--", lw=1, label=f"asked: {floor:.0%}")
    shown = [s["utility"] for row in rows for s in row["history"]]
    shown += [row["test"][name] for row in rows for name in ("accuracy_before", "accuracy_after")]
    accuracy.set(
        xlabel="step of the lock", ylabel="accuracy", ylim=(min(*shown, floor) - 0.01, 1.002)
    )
    sigma.plot([], [], "k:", label="median growth of a matrix")
    sigma.set(xlabel="step of the lock", ylabel="largest singular value; growth", yscale="log")
    matrices.axhline(wanted, color="0.4", ls="--", lw=1, label=f"asked: {wanted:g}")
    matrices.set(
        ylabel="growth of the largest singular value",
        xlabel="matrix, from the stem to the classifier",
        yscale="log",
    )
    matrices.set_xticks(np.arange(0, len(rows[0]["matrices"]), 2))
    for axis in (accuracy, sigma, matrices):
        axis.legend(fontsize=8)
        axis.grid(color="0.9", lw=0.6)
        axis.set_axisbelow(True)
    return figure
