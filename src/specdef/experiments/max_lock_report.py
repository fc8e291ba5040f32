"""What the table of lock designs says: cells, correlations with the forecast, text, and claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]

from specdef.experiments.lock_table import (
    SCRATCH,
    UNLOCKED,
    Rows,
    cell_text,
    summarise,
    text_table,
)
from specdef.experiments.record import claim

FULL = ("full-adamw", "full-momentum", "full-lion", "full-muon", "full-adafactor")
"""Rows of which 1 % is the goal."""

PARTIAL = (
    "lora-all",
    "lora",
    "only-last-four",
    "only-last-quarter",
    "only-norms",
    "only-biases",
    "only-head",
)
"""Rows of which 5 % is the goal."""

RESISTING: dict[str, str] = {
    "only-embeddings": "what is looked up stands behind no symmetry: its gradient is that of the unlocked model, whatever the lock",
    "ia3": "it multiplies activations, and a relative change does not see their scale",
    "prompt-tuning": "it trains the input, whose gradient no lock that keeps the function changes",
    "full-kfac-1e-1": "it whitens what a layer reads and what it gives, scales included, down to its damping",
    "full-kfac-relative": "it whitens what a layer reads and what it gives, scales included",
    "rebalance": "it undoes the lock: tier 5",
}
"""Rows expected to get through any lock that keeps the function, and why."""

GOALS = {**dict.fromkeys(FULL, 0.01), **dict.fromkeys(PARTIAL, 0.05)}

FLOOR = 1e-3
"""Shares below this count as this in 1 / recovered: sweeps do not resolve less."""


def cells_of(rows: Rows, tasks: Sequence[str]) -> Rows:
    """Put seeds together, task by task.

    Args:
        rows: Of sweeps, with their task.
        tasks: Names of the tasks, in the order wanted.

    Returns:
        Cells as `summarise` makes them, what fresh weights reach among them, with task, steps, slowdown (mean, None where a seed is censored), prepare_seconds
        (mean) and predicted (geometric mean).
    """
    cells: Rows = []
    for task in tasks:
        own = [row for row in rows if row["task"] == task]
        for cell in summarise(own):
            part = [r for r in own if all(r[n] == cell[n] for n in ("lock", "attack", "optimizer"))]
            forecast = [r["predicted"] for r in part if r.get("predicted")]
            slow = [r["slowdown"] for r in part if r.get("slowdown") and not r["slowdown_censored"]]
            cells.append(
                {
                    "task": task, **cell, "steps": part[0]["steps"],
                    "slowdown": fmean(slow) if len(slow) == len(part) else None,
                    "prepare_seconds": fmean(r["prepare_seconds"] for r in part),
                    "predicted": math.exp(fmean(map(math.log, forecast))) if forecast and all(map(math.isfinite, forecast)) else None,
                }
            )  # fmt: skip
    return cells


def correlations(cells: Rows) -> dict[str, dict[str, Any]]:
    """Correlate log predicted slowdowns with log measured ones.

    Args:
        cells: Of `cells_of`.

    Returns:
        For "slowdown" (steps to half the control's gain, where it was reached) and "1/recovered" (shares below `FLOOR` count
        as that): Spearman's and Pearson's coefficients (None for fewer than three points, or without spread), their number, and
        the points.
    """
    found = {}
    for name in ("slowdown", "1/recovered"):
        points = [
            (cell["predicted"], value, cell["attack"], cell["lock"])
            for cell in cells
            if cell["predicted"] and (value := _measured(cell, name)) is not None
        ]
        x, y = (np.log([float(p[i]) for p in points]) for i in (0, 1))
        enough = len(points) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
        found[name] = {
            "spearman": float(spearmanr(x, y).statistic) if enough else None,
            "pearson": float(pearsonr(x, y).statistic) if enough else None,
            "cells": len(points),
            "points": [
                {"predicted": p, "measured": m, "attack": a, "lock": d} for p, m, a, d in points
            ],
        }
    return found


def table(
    cells: Rows, tasks: Sequence[str], designs: Sequence[str], unrun: Mapping[tuple[str, str], str]
) -> list[str]:
    """Write the table in Markdown.

    Args:
        cells: Of `cells_of`.
        tasks: Names of the tasks.
        designs: The columns.
        unrun: (attack, design) to why it was not run; design "" for all.

    Returns:
        Lines: for each task shares recovered and losses, what tier 5 costs, and what was left out.
    """
    lines: list[str] = []
    for task in tasks:
        every = [cell for cell in cells if cell["task"] == task]
        own = [cell for cell in every if cell["lock"] != SCRATCH]
        lines += ["", f"{task}: share of the unlocked gain that the best of a sweep recovers", ""]
        lines += text_table(own, designs, "recovered", {}, digits=3)
        lines += ["", f"{task}: lowest held-out loss", ""]
        lines += text_table(own, (UNLOCKED, *designs), "loss", {}, digits=3)
        lines += _from_scratch(every, "loss")
        if any(cell.get("accuracy") for cell in own):
            lines += ["", f"{task}: highest held-out accuracy of any run", ""]
            lines += text_table(own, (UNLOCKED, *designs), "accuracy", {}, digits=3)
            lines += _from_scratch(every, "accuracy")
    lines += ["", *_cost_of_undoing(cells)]
    shorter = {cell["attack"]: cell["steps"] for cell in cells}
    usual = max(shorter.values(), default=0)
    lines += [f"{attack}: {steps} steps instead of {usual}, its control too." for attack, steps in shorter.items() if steps != usual]  # fmt: skip
    reasons: dict[tuple[str, str], list[str]] = {}
    for (attack, design), why in unrun.items():
        reasons.setdefault((attack, why), []).append(design)
    for (attack, why), where in reasons.items():
        on = "" if set(where) >= set(designs) or where == [""] else f" on {', '.join(where)}"
        lines.append(f"not run{on}: {attack}: {why}")
    return lines


def claims(
    cells: Rows, locks: Rows, numbers: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """State what the numbers bear out and what not.

    Args:
        cells: Of `cells_of`.
        locks: One entry for each lock, with its output difference.
        numbers: Of `correlations`.

    Returns:
        The claims.
    """
    share = {
        (c["task"], c["attack"], c["lock"]): c["recovered"]["mean"] for c in cells if c["recovered"]
    }

    def of(design: str, attacks: Sequence[str]) -> dict[str, float]:
        return {f"{a}, {t}": v for (t, a, d), v in share.items() if d == design and a in attacks}

    said = [claim("Every lock leaves the outputs bit for bit.", all(e["output_difference"] == 0 for e in locks), largest_difference={e["lock"]: e["output_difference"] for e in locks})]  # fmt: skip
    strongest, ordinary = of("max", tuple(GOALS)), of("uniform", tuple(GOALS))
    common = sorted(strongest.keys() & ordinary.keys())
    if common:
        lost = {row: [strongest[row], ordinary[row]] for row in common if strongest[row] >= ordinary[row]}  # fmt: skip
        said.append(claim("max holds better than uniform in every row it is meant for.", not lost, rows=len(common), not_in=lost))  # fmt: skip
    for attacks, goal, who in ((FULL, 0.01, "full training"), (PARTIAL, 0.05, "training a part")):
        if found := of("max", attacks):
            over = {row: value for row, value in found.items() if value > goal}
            said.append(claim(f"max: {who} recovers at most {goal:.0%} of the unlocked gain.", not over, shares=found, beyond=over))  # fmt: skip
    for other in ("max, one-sided", "max, no gaps"):
        if strongest and (found := of(other, tuple(GOALS))):
            better, worse = fmean(strongest.values()), fmean(found.values())
            said.append(claim(f"{other} holds less, in the mean over rows.", worse > better, max=better, other=worse, shares=found))  # fmt: skip
    if found := of("max", [a for a in RESISTING if a != "rebalance"]):
        why = {attack: RESISTING[attack] for attack in RESISTING if any(row.startswith(f"{attack},") for row in found)}  # fmt: skip
        said.append(claim("What no lock that keeps the function can hold gets through max: above 5 %.", min(found.values()) > 0.05, shares=found, why=why))  # fmt: skip
    if found := of("max", ["rebalance"]):
        seconds = [c["prepare_seconds"] for c in cells if (c["attack"], c["lock"]) == ("rebalance", "max")]  # fmt: skip
        said.append(claim("Tier 5, which knows of symmetries, undoes max: re-balancing takes less than a minute and recovers above 90 %.", min(found.values()) > 0.9 and max(seconds) < 60, seconds=seconds, shares=found))  # fmt: skip
    rank = numbers["1/recovered"]["spearman"]
    if rank is not None:
        said.append(claim("The forecast ranks cells: Spearman's correlation of log predicted slowdown with log 1/recovered is above 0.5.", rank > 0.5, **{n: {k: v for k, v in part.items() if k != "points"} for n, part in numbers.items()}))  # fmt: skip
    return said


def _measured(cell: Mapping[str, Any], name: str) -> float | None:
    if name == "slowdown":
        return float(cell["slowdown"]) if cell["slowdown"] else None
    return 1 / max(float(cell["recovered"]["mean"]), FLOOR) if cell["recovered"] else None


def _from_scratch(cells: Rows, quantity: str) -> list[str]:
    """Return what fresh weights reach: no lock can hold longer than that."""
    return [
        f"From scratch ({cell['optimizer']}, {cell['steps']} steps): {cell_text(cell[quantity], digits=3)}."
        for cell in cells
        if cell["lock"] == SCRATCH and cell.get(quantity)
    ]


def _cost_of_undoing(cells: Rows) -> list[str]:
    """Return what tier 5 costs, of every design: it belongs beside every other number."""
    return [
        f"Tier 5, {cell['task']}, {cell['lock']}: re-balancing takes {cell['prepare_seconds']:.2g} s once and recovers {cell['recovered']['mean']:.3f}."
        for cell in cells
        if cell["attack"] == "rebalance" and cell["recovered"]
    ]
