"""The drawing of figure 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specdef.experiments.figure2_measure import PAPER_RATE, Size
from specdef.experiments.tiny_nets import ARCHITECTURES

SHOWN = {
    "theorem-2.1/linear": "Theorem 2.1",
    "theorem-2.1/quadratic": "Theorem 2.1, squared",
    "remark-A.3/quadratic": "Remark A.3",
    "abc-subspace/quadratic": "A B C, subspaces",
    "abc-sequential/linear": "A B C, angle after angle",
}
"""Bounds that are drawn, of those in the record."""


def plot(data: dict[str, list[dict[str, Any]]], size: Size) -> Figure:
    """Draw steps, ratios and curvature for the three networks and the compensated MLP.

    Args:
        data: The rows of the record.
        size: Scales, rates and budget.

    Returns:
        The figure; a triangle at the top marks a run that did not converge within the budget.
    """
    figure = Figure(figsize=(16, 10), layout="constrained")
    axes = figure.subplots(3, 4, sharex=True)
    titles = {"mlp": "MLP (last weight)", "cnn": "CNN (last weight)", "transformer": "Transformer (W_O)"}  # fmt: skip
    for column, architecture in enumerate(ARCHITECTURES):
        axes[0, column].set_title(titles[architecture])
        _steps(axes[0, column], data["steps"], architecture, "none", size, "C0", "")
        _bounds(axes[1, column], axes[2, column], [r for r in data["curvature"] if r["architecture"] == architecture])  # fmt: skip
    axes[0, 3].set_title("MLP, function kept (C inserted)")
    for inserted, colour in (("trainable", "C3"), ("frozen", "C2")):
        _steps(axes[0, 3], data["steps"], "mlp", inserted, size, colour, f"C {inserted}: ")
    for key, colour in (("trainable", "C3"), ("frozen", "C2")):
        rows = data["compensated"]
        x = [r["scale"] for r in rows]
        axes[1, 3].plot(x, [r[key] / r["original"] for r in rows], "o", color=colour, label=f"C {key}")  # fmt: skip
        axes[2, 3].plot(x, [r[key] for r in rows], "o", color=colour, label=f"C {key}")
    first = data["compensated"][0]["original"]
    x = sorted(set(x))
    axes[2, 3].plot(x, [first * s**2 for s in x], "k:", lw=0.8, label="scale squared")
    axes[1, 3].set(yscale="log", ylabel="lambda_max / unlocked lambda_max")
    axes[0, 0].set_ylabel("Adam's steps to the goal")
    axes[1, 0].set_ylabel("lambda_max / bound (a bound holds above 1)")
    axes[2, 0].set_ylabel("lambda_max and bounds")
    for axis in axes.flat:
        axis.set(xscale="log", yscale="log")
    for axis in (*axes[0], *axes[1:, 3]):
        axis.legend(fontsize=7)
    handles = dict(zip(*reversed(axes[2, 2].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8, fontsize=8)
    for axis in axes[2]:
        axis.set_xlabel("factor of the top singular value")
    return figure


def _steps(axis: Axes, rows: Sequence[dict[str, Any]], architecture: str, inserted: str, size: Size, colour: str, prefix: str) -> None:  # fmt: skip
    mine = [r for r in rows if (r["architecture"], r["inserted"]) == (architecture, inserted)]
    for rates, style, name in (
        ((PAPER_RATE,), "-", f"rate {PAPER_RATE:g}"),
        (size.rates, "--", "best rate"),
    ):
        label: str | None = prefix + name
        for seed in dict.fromkeys(r["seed"] for r in mine):
            found = {}
            for scale in dict.fromkeys(r["scale"] for r in mine):
                steps = [r["steps"] for r in mine if r["seed"] == seed and r["scale"] == scale and r["rate"] in rates and r["steps"] is not None]  # fmt: skip
                found[scale] = min(steps, default=None)
            reached = {s: n for s, n in found.items() if n is not None}
            axis.plot(list(reached), [max(n, 1) for n in reached.values()], style, marker=".", color=colour, lw=1, label=label)  # fmt: skip
            late = [s for s, n in found.items() if n is None]
            axis.plot(late, [size.budget * 1.1] * len(late), "^", color=colour, mfc="none" if style == "--" else colour, ms=6)  # fmt: skip
            label = None
    axis.axhline(size.budget, color="grey", lw=0.7)


def _bounds(ratio: Axes, value: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for i, (key, name) in enumerate(SHOWN.items()):
        said = [(r["scale"], r["bounds"][key]) for r in rows if "ratio" in r["bounds"][key]]
        ratio.plot([s for s, _ in said], [b["ratio"] for _, b in said], "o", ms=4, color=f"C{i}")
        value.plot([s for s, _ in said], [b["value"] for _, b in said], "o", ms=4, color=f"C{i}", label=name)  # fmt: skip
    vacuous = [name for key, name in SHOWN.items() if all("vacuous" in r["bounds"][key] for r in rows)]  # fmt: skip
    if vacuous:
        ratio.text(0.03, 0.97, "vacuous:\n" + "\n".join(vacuous), transform=ratio.transAxes, va="top", fontsize=8)  # fmt: skip
    ratio.axhline(1, color="k", lw=0.8)
    value.plot([r["scale"] for r in rows], [r["lambda_max"] for r in rows], "kx", label="lambda_max")  # fmt: skip
    first = rows[0]
    scales = [r["scale"] for r in rows if r["seed"] == first["seed"]]
    value.plot(scales, [first["lambda_max"] * s**2 for s in scales], "k:", lw=0.8, label="scale squared")  # fmt: skip
    value.plot(scales, [first["lambda_max"] * s for s in scales], "k--", lw=0.8, label="scale")
