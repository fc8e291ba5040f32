"""Attacks by locks, in Markdown and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from specdef.experiments.lock_table import SCRATCH, UNLOCKED
from specdef.experiments.paper.runs import PAPER, SWEEP


def columns_of(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns: the unlocked model, every lock, fresh weights."""
    found = dict.fromkeys(c["lock"] for c in cells)
    return [
        UNLOCKED, *(c for c in found if c not in (UNLOCKED, SCRATCH)), *([SCRATCH] if SCRATCH in found else []),
    ]  # fmt: skip


def attack_table(
    cells: Sequence[Mapping[str, Any]], quantity: str = "accuracy", *, digits: int = 2
) -> list[str]:
    """Write every model's and task's attacks as tables in Markdown.

    Args:
        cells: Of `runs.summarise`.
        quantity: accuracy, loss or recovered.
        digits: After the point.

    Returns:
        Lines: mean ± half of the 95 % interval over seeds; of a sweep with the learning rate of the best.
    """
    lines: list[str] = []
    for model, task in dict.fromkeys((c["model"], c["task"]) for c in cells):
        part = [c for c in cells if (c["model"], c["task"]) == (model, task)]
        columns = columns_of(part)
        lines += [
            "", f"{model} → {task}: {_names(quantity)}", "",
            f"| attack | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|",
        ]  # fmt: skip
        found = {(c["attack"], c["optimizer"], c["at"], c["lock"]): c for c in part}
        scratch = next((c for c in part if c["lock"] == SCRATCH), None)
        keys = dict.fromkeys((c["attack"], c["optimizer"], c["at"]) for c in part if c["lock"] != SCRATCH)  # fmt: skip
        for key in keys:
            entries = [
                _entry(scratch if c == SCRATCH and key[2] == SWEEP else found.get((*key, c)), quantity, digits)
                for c in columns
            ]  # fmt: skip
            lines.append(f"| {_row_name(key, found, columns)} | {' | '.join(entries)} |")
    return lines


def draw_attacks(
    cells: Sequence[Mapping[str, Any]],
    papers: Mapping[tuple[str, str, str], float] | None = None,
    *,
    quantity: str = "accuracy",
    chance: Mapping[str, float] | None = None,
) -> Figure:
    """Draw a panel for every model and task: a pair of bars for every lock, at the paper's rate and at the best of the sweep.

    Args:
        cells: Of `runs.summarise`.
        papers: (model, task, lock) to the paper's number, drawn as a mark.
        quantity: accuracy, loss or recovered.
        chance: Task to what guessing gives, dotted.

    Returns:
        The figure; with several attacks the highest bar of each way is drawn (the lowest of losses).
    """
    panels = list(dict.fromkeys((c["model"], c["task"]) for c in cells))
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.2 * across, 3.6 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    pick = min if quantity == "loss" else max
    for axis, (model, task) in zip(axes, panels, strict=False):
        part = [c for c in cells if (c["model"], c["task"]) == (model, task)]
        columns = columns_of(part)
        for shift, (at, colour) in enumerate(((PAPER, "C7"), (SWEEP, "C0"))):
            heights = []
            for column in columns:
                values = [c[quantity]["mean"] for c in part if c["lock"] == column and c["at"] == at and c[quantity]]  # fmt: skip
                heights.append(pick(values) if values else float("nan"))
            axis.bar([i + 0.4 * shift - 0.2 for i in range(len(columns))], heights, 0.38, color=colour, label=at)  # fmt: skip
        for i, column in enumerate(columns):
            if (known := (papers or {}).get((model, task, column))) is not None:
                axis.plot([i], [known], "k_", ms=22, mew=2, label="the paper" if column == UNLOCKED else "")  # fmt: skip
        if chance and task in chance:
            axis.axhline(chance[task], color="k", ls=":", lw=1)
        axis.set_xticks(range(len(columns)), [c.replace(" ", "\n") for c in columns], fontsize=8)
        axis.set_title(f"{model} → {task}", fontsize=9)
        axis.set_ylabel(_names(quantity), fontsize=8)
    for axis in axes[len(panels) :]:
        axis.remove()
    axes[0].legend(fontsize=8)
    return figure


def lock_table(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write what locking did to each model's own task as a table in Markdown.

    Args:
        facts: Of `locks.lock_all`.

    Returns:
        Lines.
    """
    lines = ["", "| model | lock | own task before | locked | largest singular value | seconds |", "|---" * 6 + "|"]  # fmt: skip
    for fact in facts:
        if "sigma_max_after" in fact:
            growth = f"{fact['sigma_max_before']:.3g} → {fact['sigma_max_after']:.3g} (median matrix {fact['growth_median']:.2f}x)"
        else:
            growth = f"scale {fact['scale']:.3g}"
        lines.append(
            f"| {fact['model']} | {fact['lock']} | {fact['utility_before']:.4f} | {fact['utility_after']:.4f} | {growth} | {fact['seconds']:.1f} |"
        )
    return lines


def _names(quantity: str) -> str:
    return {"recovered": "share of the unlocked gain", "loss": "held-out loss"}.get(quantity, quantity)  # fmt: skip


def _row_name(
    key: tuple[str, str, str], found: Mapping[Any, Mapping[str, Any]], columns: Sequence[str]
) -> str:
    if key[2] != PAPER:
        return f"{key[0]}, {key[2]}"
    rate = next(found[*key, c]["learning_rates"][0] for c in columns if (*key, c) in found)
    return f"{key[0]} at {rate:g}, {PAPER}"


def _entry(cell: Mapping[str, Any] | None, quantity: str, digits: int) -> str:
    if cell is None:
        return "–"
    value = cell[quantity]
    if value is None:
        return next((s for s in cell["statuses"] if s and s != "finished"), "–")
    text = f"{value['mean']:.{digits}f}"
    if value["interval"] is not None:
        text += f" ± {value['interval'][1] - value['mean']:.{digits}f}"
    if cell["at"] != PAPER:
        text += f" ({', '.join(f'{rate:g}' for rate in dict.fromkeys(cell['learning_rates']))})"
    return text
