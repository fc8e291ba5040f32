"""Drawing of `collapse`: the planted law, forecasts with their bands under the runs, and both at the end of every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


def draw(planted: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the planted runs, every way of fine-tuning, and forecast against observation.

    Args:
        planted: Of `planted_results`.
        rows: Reports with their run and seed.

    Returns:
        The figure.
    """
    ways = list(dict.fromkeys(row["run"] for row in rows))
    figure = Figure(figsize=(4.2 * (len(ways) + 2), 4), layout="constrained")
    first, *middle, last = figure.subplots(1, len(ways) + 2)
    for colour, entry in enumerate(planted):
        if entry["report"]["applicable"]:
            _curves(first, entry["report"], f"C{colour}", entry["name"])
    first.set_title("planted", fontsize=9)
    for axis, way in zip(middle, ways, strict=True):
        part = [row for row in rows if row["run"] == way]
        for row in part:
            tasks = list(dict.fromkeys(r["task"] for r in part))
            _curves(axis, row, f"C{tasks.index(row['task'])}", row["task"])
        axis.set_title(f"{way}: lines observed, dashes and band forecast", fontsize=9)
    for axis in (first, *middle):
        axis.set(xscale="log", yscale="log", xlabel="step", ylabel="alignment loss")
        axis.legend(fontsize=7)
    for colour, way in enumerate(ways):
        part = [row for row in rows if row["run"] == way]
        x = [row["forecast"]["alignment"][-1] for row in part]
        y = [row["observed"]["alignment"][-1] for row in part]
        last.scatter(x, y, s=18, color=f"C{colour}", label=way)
    ends = [v for row in rows for v in (row["forecast"]["alignment"][-1], row["observed"]["alignment"][-1]) if v and v > 0]  # fmt: skip
    if ends:
        last.plot([min(ends), max(ends)], [min(ends), max(ends)], color="0.6", linewidth=0.8)
        last.set(xscale="log", yscale="log")
    last.set(xlabel="forecast at the last step", ylabel="observed")
    last.legend(fontsize=7)
    return figure


def _curves(axis: Any, report: Mapping[str, Any], colour: str, label: str) -> None:
    """Draw one report: what was seen as a line, what was forecast as dashes with its band."""
    forecast, observed = report["forecast"], report["observed"]
    seen = [i for i, value in enumerate(observed["alignment"]) if value > observed["floor"]]
    said = slice(seen[0] if seen else 0, None)  # before it there is nothing but rounding
    steps, low, high, point = (forecast[name][said] for name in ("steps", "low", "high", "alignment"))  # fmt: skip
    axis.fill_between(steps, low, high, color=colour, alpha=0.15)
    axis.plot(steps, point, "--", color=colour, linewidth=0.9)
    x, y = ([observed[name][i] for i in seen] for name in ("steps", "alignment"))
    axis.plot(x, y, "o-", color=colour, markersize=2.5, linewidth=1, label=label)
