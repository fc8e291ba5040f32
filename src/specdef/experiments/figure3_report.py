"""What every model reaches at every learning rate, beside Figure 3 of papers/001."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from specdef.experiments.lock_table import SCRATCH, UNLOCKED, Rows
from specdef.experiments.paper.locks import DEFORMATION, raised
from specdef.experiments.paper.runs import PAPER, SWEEP
from specdef.experiments.paper.verdicts import (
    FAILED,
    HELD,
    ONLY_THERE,
    RESISTED,
    comparison,
    held_if,
)

RATES = tuple(10.0**-i for i in range(3, 9))
"""The paper's."""

WINDOW = (1e-6, 1e-3)
"""Where the paper's unlocked model learns."""


def curves(rows: Rows) -> Rows:
    """Put runs together: one point for every task, lock, way and learning rate.

    Args:
        rows: Of `attack_case`, with gains counted from the guess.

    Returns:
        Points: mean loss and accuracy of the seeds (lowest and highest of a run, at the paper's rates; of the sweep's runs,
        one seed), the share of the most that the unlocked model gains at any rate (None where that is nothing), the guess.
    """
    points: dict[tuple[str, str, str, float], list[tuple[float, float | None]]] = {}
    for row in rows:
        found = (
            [(row["learning_rate"], row["loss"], row["best_accuracy"])] if row["at"] == PAPER
            else [(rate, loss, accuracy) for rate, _, _, loss, accuracy in row["runs"]]
        )  # fmt: skip
        for rate, loss, accuracy in found:
            key = (row["task"], row["lock"], row["at"], rate)
            points.setdefault(key, []).append((_number(loss), accuracy))
    begin = {row["task"]: row for row in rows if row["lock"] == UNLOCKED and row["at"] == PAPER}
    made = []
    for (task, lock, at, rate), values in sorted(points.items(), key=lambda item: item[0][:3]):
        known = [a for _, a in values if a is not None and math.isfinite(a)]
        made.append({
            "task": task, "lock": lock, "at": at, "learning_rate": rate, "loss": fmean(loss for loss, _ in values),
            "accuracy": fmean(known) if known else None, "start": begin[task]["start_loss"], "guess": begin[task]["guess"],
            "seeds": len(values),
        })  # fmt: skip
    lowest = {
        task: min(p["loss"] for p in made if (p["task"], p["lock"]) == (task, UNLOCKED))
        for task in begin
    }
    for point in made:
        gain = point["start"] - lowest[point["task"]]
        point["share"] = None if gain <= 0 else (point["start"] - point["loss"]) / gain
    return made


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def comparisons(points: Rows, facts: Sequence[Mapping[str, Any]] = ()) -> Rows:
    """Compare with the paper: where the unlocked model learns, and that a locked one learns nowhere.

    Args:
        points: Of `curves`.
        facts: Of `lock_all`.

    Returns:
        One entry for every task and model.
    """
    found = []
    for task in dict.fromkeys(p["task"] for p in points):
        part = [p for p in points if p["task"] == task]
        found.append(_window(task, part))
        if all(p["share"] is None for p in part):
            continue
        locks = dict.fromkeys(p["lock"] for p in part if p["lock"] not in (UNLOCKED, SCRATCH))
        found += [_resists(task, lock, part, raised(facts, lock)) for lock in locks]
    return found


def _window(task: str, part: Rows) -> dict[str, Any]:
    own = _shares(part, UNLOCKED, PAPER)
    learns = sorted(rate for rate, share in own.items() if share >= RESISTED)
    inside = bool(learns) and WINDOW[0] <= learns[0] and learns[-1] <= WINDOW[1] and len(learns) < len(own)  # fmt: skip
    beyond = sorted(rate for rate, share in _shares(part, UNLOCKED, SWEEP).items() if share >= RESISTED)  # fmt: skip
    notes = ["the paper: DeBERTa-v3-xsmall on RTE"]
    if not own:
        notes.append("it learns nothing in these steps, so what locks resist is not judged")
    if beyond and beyond[-1] > RATES[0]:
        notes.append(f"beyond the paper's rates it learns at up to {beyond[-1]:g}")
    return comparison(
        f"{task}: learning rates at which the unlocked model learns", paper=f"between {WINDOW[1]:g} and {WINDOW[0]:g}",
        ours=_rates(learns), verdict=held_if(inside), note="; ".join(notes), shares={f"{r:g}": s for r, s in own.items()},
    )  # fmt: skip


def _resists(task: str, lock: str, part: Rows, growth: str) -> dict[str, Any]:
    control = max(_shares(part, UNLOCKED, PAPER).values(), default=-math.inf)
    there, elsewhere = _shares(part, lock, PAPER), _shares(part, lock, SWEEP)
    learns = sorted(rate for rate, share in there.items() if share >= RESISTED)
    beyond = sorted(rate for rate, share in elsewhere.items() if share >= RESISTED)
    notes = (
        [growth]
        if lock == DEFORMATION and growth
        else []
        if lock == DEFORMATION
        else ["the paper's claim is on its own lock"]
    )
    swept = any(p["lock"] == lock and p["at"] == SWEEP for p in part)
    if not swept:
        notes.append("not swept")
    if control < RESISTED:
        notes.append("the unlocked model does not learn at the paper's rates either")
    verdict = FAILED if learns else ONLY_THERE if beyond or not swept else HELD
    return comparison(
        f"{task}: learning rates at which the model learns under the lock, {lock}", paper=f"none of {RATES[0]:g} to {RATES[-1]:g}",
        ours=_rates(learns) + (f"; of the sweep {_rates(beyond)}" if swept else ""), verdict=verdict, note="; ".join(notes),
        shares={f"{r:g}": s for r, s in there.items()}, shares_sweep={f"{r:g}": s for r, s in elsewhere.items()},
    )  # fmt: skip


def _shares(part: Rows, lock: str, at: str) -> dict[float, float]:
    return {
        p["learning_rate"]: p["share"]
        for p in part
        if p["lock"] == lock and p["at"] == at and p["share"] is not None
    }


def _rates(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in reversed(rates)) or "none"


def rate_table(points: Rows, quantity: str, digits: int) -> list[str]:
    """Write a quantity by learning rate and lock as tables in Markdown.

    Args:
        points: Of `curves`.
        quantity: loss, accuracy or share.
        digits: After the point.

    Returns:
        Lines; the sweep's rates, with their own schedule, stand in rows of their own.
    """
    names = {
        "loss": "lowest held-out loss",
        "accuracy": "highest accuracy",
        "share": "share of the unlocked gain in loss",
    }
    lines: list[str] = []
    for task in dict.fromkeys(p["task"] for p in points):
        part = [p for p in points if p["task"] == task]
        columns = _columns(part)
        found: dict[tuple[str, float, str], Mapping[str, Any]] = {(p["at"], p["learning_rate"], p["lock"]): p for p in part}  # fmt: skip
        lines += ["", f"{task}: {names[quantity]}", "", f"| learning rate | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]  # fmt: skip
        for at, rate in sorted({key[:2] for key in found}, key=lambda key: (key[0] != PAPER, -key[1])):  # fmt: skip
            values = [found.get((at, rate, column), {}).get(quantity) for column in columns]
            entries = [f"{v:.{digits}f}" if v is not None else "–" for v in values]
            name = f"{rate:g}" + ("" if at == PAPER else " (sweep)")
            lines.append(f"| {name} | {' | '.join(entries)} |")
    return lines


def _columns(part: Rows) -> list[str]:
    found = dict.fromkeys(p["lock"] for p in part)
    return sorted(found, key=lambda lock: (lock != UNLOCKED, lock == SCRATCH))


def draw(points: Rows) -> Figure:
    """Draw loss and accuracy over the learning rate, a line for every lock, the sweep dotted.

    Args:
        points: Of `curves`.

    Returns:
        The figure: a row for every task.
    """
    tasks = list(dict.fromkeys(p["task"] for p in points))
    figure = Figure(figsize=(11, 3.8 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for line, task in zip(axes, tasks, strict=True):
        part = [p for p in points if p["task"] == task]
        for axis, quantity in zip(line, ("accuracy", "loss"), strict=True):
            for i, lock in enumerate(_columns(part)):
                for at, style in ((PAPER, "o-"), (SWEEP, ".:")):
                    own = sorted((p["learning_rate"], p[quantity]) for p in part if (p["lock"], p["at"]) == (lock, at) and p[quantity] is not None)  # fmt: skip
                    name = lock if at == PAPER or lock == SCRATCH else None
                    if own:
                        axis.plot(*zip(*own, strict=True), style, color=f"C{i}", label=name)
            axis.set_xscale("log")
            axis.set_xlabel("learning rate")
            axis.set_ylabel(f"{'highest' if quantity == 'accuracy' else 'lowest'} held-out {quantity}")  # fmt: skip
            axis.axvspan(RATES[-1], RATES[0], color="k", alpha=0.05)
            axis.set_title(task, fontsize=9)
        line[1].axhline(part[0]["guess"], color="k", ls=":", lw=1)
    axes[0, 0].legend(fontsize=8)
    return figure
