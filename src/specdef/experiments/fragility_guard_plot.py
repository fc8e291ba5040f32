"""The guard experiment as a table and as curves of alignment loss over task loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

FLOOR = 1e-6
"""Alignment losses below are drawn here."""


def label(row: Mapping[str, Any]) -> str:
    """Return a run's guard, with its strength."""
    return row["guard"] if row["strength"] is None else f"{row['guard']} {row['strength']:g}"


def tables(name: str, rows: Sequence[Mapping[str, Any]], levels: Sequence[float]) -> list[str]:
    """Write alignment losses at equal task loss, and both losses after the last step, geometric means over seeds.

    Args:
        name: Of the case.
        rows: Its runs.
        levels: Shares of the unguarded gain.

    Returns:
        Lines of a Markdown table.
    """
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    heads = [f"{o}, {level:.0%}" for o in optimizers for level in levels]
    ends = [f"{o}, end: task / alignment" for o in optimizers]
    lines = [f"{name}: alignment loss where the task loss has come a share of the unguarded way, and after the last step"]  # fmt: skip
    lines += [f"| guard | {' | '.join(heads + ends)} |", "|---" * (1 + len(heads) + len(ends)) + "|"]  # fmt: skip
    for guard in dict.fromkeys(map(label, rows)):
        cells = []
        for o in optimizers:
            found = [row["at"] for row in rows if label(row) == guard and row["optimizer"] == o]
            cells += [_mean([at[f"{level:g}"] for at in found]) for level in levels]
        for o in optimizers:
            last = [r["curve"][-1] for r in rows if label(r) == guard and r["optimizer"] == o]
            cells.append(f"{_mean([p[1] for p in last])} / {_mean([p[2] for p in last])}")
        lines.append(f"| {guard} | {' | '.join(cells)} |")
    return lines


def _mean(values: Sequence[float | None]) -> str:
    """Return the geometric mean; a dash where a seed has none."""
    known = [v for v in values if v is not None and 0 < v < math.inf]
    if len(known) < len(values):
        return "–"
    return f"{math.exp(sum(map(math.log, known)) / len(known)):.3g}"


def draw(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw alignment loss over task loss, a panel per case and optimiser.

    Args:
        results: Runs by case.

    Returns:
        The figure.
    """
    panels = [(name, o) for name, rows in results.items() for o in dict.fromkeys(r["optimizer"] for r in rows)]  # fmt: skip
    figure = Figure(figsize=(5 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, optimizer) in zip(axes, panels, strict=True):
        rows = [row for row in results[name] if row["optimizer"] == optimizer]
        names = list(dict.fromkeys(map(label, rows)))
        seen: set[str] = set()
        for row in rows:
            text = label(row)
            i = names.index(text)
            axis.plot(
                [p[1] for p in row["curve"]], [max(p[2], FLOOR) for p in row["curve"]], color=f"C{i}",
                linestyle="--" if row["strength"] else "-", linewidth=1.4, label=None if text in seen else text,
            )  # fmt: skip
            seen.add(text)
        axis.set_yscale("log")
        axis.invert_xaxis()
        axis.set_title(f"{name}, {optimizer}")
        axis.set_xlabel("task loss, held out (falls to the right)")
    axes[0].set_ylabel("alignment loss, nats")
    axes[-1].legend(fontsize=8)
    return figure
