"""Table 1 of papers/001, vision, beside ours: the table, the figure, and a verdict on every number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from specdef.experiments.lock_table import UNLOCKED, Rows
from specdef.experiments.paper.locks import DEFORMATION
from specdef.experiments.paper.runs import PAPER, SWEEP
from specdef.experiments.paper.tables import draw_attacks
from specdef.experiments.paper.verdicts import (
    FAILED,
    HELD,
    ONLY_THERE,
    RESISTED,
    comparison,
    held_if,
    resistance,
)
from specdef.experiments.table1_vision_setup import MAIN, Settings, Target

MODEL = "ResNet-18"
MNIST = 0.99
"""The paper's accuracy on digits, locked or not."""

CHANCE = 0.10
"""Of ten classes; the paper's accuracy of every locked net."""

TRAINED = 0.98
"""Accuracy on digits from which on the net counts as trained: the paper's, less a point."""

KEPT = 0.01
"""Accuracy on digits a lock may cost: the paper prints whole points, and the same before and after."""

DEVIATIONS = 3.5
"""Standard deviations above chance up to which an accuracy counts as guessing: the best of some fifty looks at guesses stays below."""


def guessing(settings: Settings) -> float:
    """Return the highest accuracy that counts as guessing.

    Args:
        settings: The more pictures judge, the lower it is.

    Returns:
        A fraction.
    """
    return CHANCE + DEVIATIONS * math.sqrt(CHANCE * (1 - CHANCE) / settings.heldout_rows)


def share(cell: Mapping[str, Any] | None, limit: float) -> float | None:
    """Return what an attack recovers of the unlocked gain; nothing where it only guesses.

    Args:
        cell: Of `runs.summarise`, None for an attack that was not run.
        limit: Highest accuracy that counts as guessing.

    Returns:
        Share; None where it is unknown: the attack was not run, or the unlocked net gains nothing.
    """
    if cell is None:
        return None
    if _accuracy(cell) <= limit:
        return 0.0
    recovered: float | None = cell["recovered"] and cell["recovered"]["mean"]
    return recovered


def comparisons(settings: Settings, trainings: Rows, facts: Rows, cells: Rows) -> list[dict[str, Any]]:  # fmt: skip
    """Set every number the paper reports beside ours.

    Args:
        settings: Names the tasks.
        trainings: Records of the originals' trainings.
        facts: Of `lock_all`.
        cells: Of `runs.summarise`, the paper's attacks and the sweeps apart.

    Returns:
        Entries for the record: the net's own task, what the unlocked net learns, and for every lock what it keeps and prevents.
    """
    limit = guessing(settings)
    before = _mean(t["accuracy"] for t in trainings)
    entries = [
        comparison(
            "digits read by the original ResNet-18", paper=_percent(MNIST), ours=_percent(before, 1), verdict=held_if(before >= TRAINED),
            note=f"{settings.original.rows:,} pictures, {settings.original.epochs} epochs", accuracy=before, limit=TRAINED,
        ),
        *(_control(target, cells, limit) for target in settings.targets),
    ]  # fmt: skip
    for lock in dict.fromkeys(fact["lock"] for fact in facts):
        own = "" if lock == DEFORMATION else "the paper's numbers are the deformation's"
        entries.append(_utility(lock, [f for f in facts if f["lock"] == lock], own))
        entries += [_resisted(lock, target, cells, limit, own) for target in settings.targets]
        entries.append(_chance(lock, settings, cells, limit, own))
    return entries


def table(settings: Settings, trainings: Rows, facts: Rows, cells: Rows) -> list[str]:
    """Write the paper's table with ours below it, in Markdown.

    Args:
        settings: Names the tasks.
        trainings: Records of the originals' trainings.
        facts: Of `lock_all`.
        cells: Of `runs.summarise`.

    Returns:
        Lines; per cent, means over seeds.
    """
    names = [target.name for target in settings.targets]
    locks = list(dict.fromkeys(fact["lock"] for fact in facts))
    kept = {lock: _mean(f["utility_after"] for f in facts if f["lock"] == lock) for lock in locks}
    kept[UNLOCKED] = _mean(f["utility_before"] for f in facts)
    lines = [
        f"Accuracy after training with AdamW at 0.1, as the paper trains, and at the best of all runs; up to {_percent(guessing(settings))} is guessing",
        "", f"| net | digits | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|",
        f"| *unlocked, the paper* | {_percent(MNIST)} | {' | '.join(_percent(t.paper) for t in settings.targets)} |",
        f"| *deformation, the paper* | {_percent(MNIST)} | {' | '.join(_percent(CHANCE) for _ in names)} |",
    ]  # fmt: skip
    for lock in (UNLOCKED, *locks):
        entries = [f"{_text(_papers(cells, n, lock))}; {_text(_best(cells, n, lock))}" for n in names]  # fmt: skip
        lines.append(f"| {lock} | {_percent(kept[lock], 1)} | {' | '.join(entries)} |")
    return lines


def draw(settings: Settings, cells: Rows) -> Figure:
    """Draw a panel for every task: AdamW at the paper's rate beside the best of the sweeps, and the paper's numbers.

    Args:
        settings: Names the tasks.
        cells: Of `runs.summarise`.

    Returns:
        The figure.
    """
    papers = {(MODEL, t.name, UNLOCKED): t.paper for t in settings.targets}
    papers |= {(MODEL, t.name, DEFORMATION): CHANCE for t in settings.targets}
    shown = [c for c in cells if c["at"] == SWEEP or c["attack"] == MAIN]
    return draw_attacks(shown, papers, chance={t.name: CHANCE for t in settings.targets})


def _control(target: Target, cells: Rows, limit: float) -> dict[str, Any]:
    """Compare what the unlocked net learns; it holds from halfway between chance and the paper's number on."""
    there, best = _papers(cells, target.name, UNLOCKED), _best(cells, target.name, UNLOCKED)
    wanted = (CHANCE + target.paper) / 2
    reached = _accuracy(there)
    notes = [f"{target.steps} steps; held from {_percent(wanted)} on"]
    if reached <= limit:
        notes.append(f"at the paper's rate it learns nothing in so many steps; at its best it reaches {_text(best)}")  # fmt: skip
    return comparison(
        f"{target.name} learned by the unlocked net", paper=_percent(target.paper),
        ours=f"{_text(there)} with AdamW at 0.1; {_text(best)} at best", verdict=held_if(reached >= wanted),
        note="; ".join(notes), accuracy=reached, best=_accuracy(best), wanted=wanted,
    )  # fmt: skip


def _utility(lock: str, facts: Rows, note: str) -> dict[str, Any]:
    before, after = (_mean(f[f"utility_{when}"] for f in facts) for when in ("before", "after"))
    worst = max(f["utility_before"] - f["utility_after"] for f in facts)
    return comparison(
        f"digits read under the lock: {lock}", paper=f"{_percent(MNIST)} → {_percent(MNIST)}",
        ours=f"{_percent(before, 1)} → {_percent(after, 1)}", verdict=held_if(worst <= KEPT + 1e-9), note=note, lost=worst, limit=KEPT,
    )  # fmt: skip


def _resisted(lock: str, target: Target, cells: Rows, limit: float, note: str) -> dict[str, Any]:
    """Compare what can be learned under a lock, as a share of what is learned without one."""
    there, best = _papers(cells, target.name, lock), _best(cells, target.name, lock)
    shares = [share(there, limit), _best_share(cells, target.name, lock, limit)]
    control = share(_papers(cells, target.name, UNLOCKED), limit)
    notes = [note] if note else []
    if control is None or control < RESISTED:
        notes.append("the unlocked net itself learns nothing at the paper's rate in these steps")
    return comparison(
        f"{target.name} learned under the lock: {lock}", paper=_percent(CHANCE),
        ours=f"{_text(there)} with AdamW at 0.1 ({_share(shares[0])} of the unlocked gain); {_text(best)} at best ({_share(shares[1])})",
        verdict=resistance(*shares), note="; ".join(notes), share_at_the_papers_rate=shares[0], share_best=shares[1],
        control_at_the_papers_rate=control, limit=RESISTED, guessing=limit,
    )  # fmt: skip


def _chance(lock: str, settings: Settings, cells: Rows, limit: float, note: str) -> dict[str, Any]:
    """Compare the row of the table: whether the locked net does no better than guess, on any task."""
    names = [target.name for target in settings.targets]
    there, best = ([find(cells, name, lock) for name in names] for find in (_papers, _best))
    guesses = [all(_accuracy(cell) <= limit for cell in part) for part in (there, best)]
    verdict = (HELD if guesses[1] else ONLY_THERE) if guesses[0] else FAILED
    return comparison(
        f"{', '.join(names)}: only guesses under the lock: {lock}", paper=" / ".join(_percent(CHANCE) for _ in names),
        ours=f"{' / '.join(map(_text, there))} with AdamW at 0.1; {' / '.join(map(_text, best))} at best", verdict=verdict,
        note="; ".join(n for n in (note, f"up to {_percent(limit)} is guessing") if n), limit=limit,
        accuracies=[_accuracy(c) for c in there], best=[_accuracy(c) for c in best],
    )  # fmt: skip


def _papers(cells: Rows, task: str, lock: str) -> dict[str, Any] | None:
    """Return the cell of AdamW at the paper's rate."""
    return next((c for c in _of(cells, task, lock) if c["at"] == PAPER and c["attack"] == MAIN), None)  # fmt: skip


def _best(cells: Rows, task: str, lock: str) -> dict[str, Any] | None:
    """Return the cell with the highest accuracy."""
    return max(_of(cells, task, lock), key=_accuracy, default=None)


def _best_share(cells: Rows, task: str, lock: str, limit: float) -> float | None:
    """Return what the best attack of all reaches above chance, as a share of the unlocked net's best; nothing where it guesses."""
    reached, control = (_accuracy(_best(cells, task, net)) for net in (lock, UNLOCKED))
    if reached <= limit:
        return 0.0
    return (reached - CHANCE) / (control - CHANCE) if control > limit else None


def _of(cells: Rows, task: str, lock: str) -> Rows:
    return [c for c in cells if c["task"] == task and c["lock"] == lock]


def _accuracy(cell: Mapping[str, Any] | None) -> float:
    """Return the mean accuracy; 0 where every run diverged, or none was made."""
    return cell["accuracy"]["mean"] if cell and cell["accuracy"] else 0.0


def _mean(values: Any) -> float:
    known = list(values)
    return float(sum(known) / len(known))


def _text(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    return _percent(cell["accuracy"]["mean"]) if cell["accuracy"] else "diverged"


def _percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def _share(value: float | None) -> str:
    return "share unknown" if value is None else f"{value:.2f}"
