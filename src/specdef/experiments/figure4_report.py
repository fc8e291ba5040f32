"""What came out of Figure 4 of papers/001, again: its claims with verdicts, and its curves beside the best of every sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from specdef.experiments.figure4_data import CHANCE
from specdef.experiments.figure4_setup import MODEL, PAPERS, TITLES, Group, Settings
from specdef.experiments.lock_table import SCRATCH, UNLOCKED, Rows
from specdef.experiments.paper.locks import DEFORMATION, LOCKS
from specdef.experiments.paper.runs import PAPER, SWEEP
from specdef.experiments.paper.tables import columns_of
from specdef.experiments.paper.verdicts import RESISTED, comparison, held_if, resistance

KEPT = 0.01
"""Accuracy on its own task that a lock which does not degrade the net may cost: the paper gives whole points."""

LEARNED = 0.98
"""Accuracy on its own task that is asked before a lock: the paper's 99 % less one point."""

SECOND_ORDER = ("lbfgs", "natural-gradient")
"""What the paper tried as well, without numbers."""

KFAC = ("kfac-1e-3", "kfac-relative")

FEW = "best of few rates"
"""Where a sweep would take too long."""

Cell = Mapping[str, Any]


def from_chance(rows: Rows) -> Rows:
    """Let gains count from chance: a net that is sure of wrong classes is below it, and gains that much by forgetting.

    Args:
        rows: Of `attack_case`.

    Returns:
        The rows, their accuracy at the start raised to chance where it is less.
    """
    return [{**row, "start_accuracy": max(CHANCE, row.get("start_accuracy") or 0.0)} for row in rows]  # fmt: skip


def best_of_few(rows: Rows, group: Group) -> Rows:
    """Put runs at rates that are not the paper's together, as a sweep's are: the highest accuracy and the lowest loss of any.

    Args:
        rows: Of `attack_case`, of one seed.
        group: Says which optimisers have few rates.

    Returns:
        The rows; in place of those at few rates one for each optimiser and net.
    """
    few = [name for name, _ in group.few]
    kept = [row for row in rows if row["at"] != PAPER or row["optimizer"] not in few]
    found: dict[tuple[str, str], Rows] = {}
    for row in rows:
        if row not in kept:
            found.setdefault((row["optimizer"], row["lock"]), []).append(row)
    for part in found.values():
        best = min(part, key=lambda row: math.inf if row["loss"] is None else row["loss"])
        known = [row["best_accuracy"] for row in part if row["best_accuracy"] is not None]
        runs = [[r["learning_rate"], r["status"], r["steps"], r["loss"], r["best_accuracy"]] for r in part]  # fmt: skip
        seconds = round(sum(row["seconds"] for row in part), 2)
        kept.append({**best, "at": FEW, "accuracy": max(known, default=None), "seconds": seconds, "runs": runs})  # fmt: skip
    return kept


def find(cells: Sequence[Cell], optimizer: str, at: str, lock: str) -> Cell | None:
    """Find what an optimiser made of a net.

    Args:
        cells: Of `summarise`, groups in the order of the settings.
        optimizer: Its name.
        at: The paper's rate, or the best of a sweep.
        lock: On what.

    Returns:
        The cell of the first group that has one; None where none has.
    """
    keys = {"optimizer": optimizer, "at": at, "lock": lock, "attack": f"full-{optimizer}"}
    return next((c for c in cells if all(c[k] == v for k, v in keys.items())), None)


def best_of(cells: Sequence[Cell], optimizer: str, lock: str) -> Cell | None:
    """Find the best an optimiser made of a net: of its sweep, or of the few rates tried instead.

    Args:
        cells: As for `find`.
        optimizer: Its name.
        lock: On what.

    Returns:
        The cell; None where there is none.
    """
    return find(cells, optimizer, SWEEP, lock) or find(cells, optimizer, FEW, lock)


def share(cell: Cell | None) -> float | None:
    """Return the mean share of the unlocked gain of a cell; None where it is not known."""
    return cell["recovered"]["mean"] if cell and cell["recovered"] else None


def comparisons(facts: Rows, cells: Sequence[Cell], settings: Settings) -> list[dict[str, Any]]:
    """Set the paper's claims about preconditioners beside what was measured.

    Args:
        facts: Of the locks, one for each lock and seed.
        cells: Of `summarise`.
        settings: Which optimisers were run.

    Returns:
        Entries of a record.
    """
    run = [name for name in TITLES if any(name in group.optimizers for group in settings.groups)]
    found = [_learned(facts), *(_kept(facts, lock) for lock in LOCKS)]
    goal = settings.goal
    found += [_control(cells, name, goal) for name in run if name in PAPERS]
    found += [
        _resisted(cells, name, lock, goal) for name in run if name in PAPERS for lock in LOCKS
    ]
    for name in (n for n in run if n in SECOND_ORDER):
        found.append(_effective(cells, name, goal))
        found += [_ineffective(cells, name, lock) for lock in LOCKS]
    found += [_full_needed(cells, name, lock) for name in run if name in KFAC for lock in LOCKS]
    return found


def draw(rows: Rows, cells: Sequence[Cell], settings: Settings) -> Figure:
    """Draw held-out accuracy over steps at the paper's rates, and the best over every sweep.

    Args:
        rows: Of `attack_case`.
        cells: Of `summarise`.
        settings: Which optimisers were run.

    Returns:
        The figure: a panel for each optimiser of the paper, a line for every net and seed; below, bars for all optimisers.
    """
    shown = [name for name in PAPERS if any(name in group.papers for group in settings.groups)]
    columns = [c for c in columns_of(cells) if c != SCRATCH]
    colours = {column: f"C{i}" if i else "k" for i, column in enumerate(columns)}
    figure = Figure(figsize=(3.1 * len(shown), 6.0), layout="constrained")
    grid = figure.add_gridspec(2, len(shown))
    first = min(row["seed"] for row in rows)
    panels = [figure.add_subplot(grid[0, i]) for i in range(len(shown))]
    for name, axis in zip(shown, panels, strict=True):
        for row in (r for r in rows if r["at"] == PAPER and r["optimizer"] == name):
            points = [
                (step, accuracy) for step, _, accuracy in row["curve"] if accuracy is not None
            ]
            style: dict[str, Any] = {"lw": 1, "color": colours[row["lock"]], "label": row["lock"] if row["seed"] == first else None}  # fmt: skip
            axis.plot(*zip(*points, strict=True), "o-", ms=2, **style)
            if row["status"] == "diverged":
                axis.plot(*points[-1], "x", ms=9, color=colours[row["lock"]])
        axis.axhline(CHANCE, color="0.6", ls=":", lw=1)
        axis.set_title(f"{TITLES[name]} at {PAPERS[name].learning_rate:g}, {PAPER}", fontsize=9)
        axis.set_xlabel("steps (×: diverged)", fontsize=8)
        axis.sharey(panels[0])
    panels[0].set_ylabel("accuracy, held out", fontsize=8)
    panels[0].legend(fontsize=7)
    axis = figure.add_subplot(grid[1, :])
    swept = [name for name in TITLES if best_of(cells, name, UNLOCKED)]
    width = 0.8 / len(columns)
    for j, column in enumerate(columns):
        found = (best_of(cells, name, column) for name in swept)
        heights = [c["accuracy"]["mean"] if c and c["accuracy"] else math.nan for c in found]
        axis.bar([i + width * (j + 0.5) - 0.4 for i in range(len(swept))], heights, width, color=colours[column], label=column)  # fmt: skip
    axis.axhline(CHANCE, color="0.6", ls=":", lw=1)
    axis.set_xticks(range(len(swept)), [TITLES[name] for name in swept], fontsize=8)
    axis.set_ylabel("accuracy, held out", fontsize=8)
    axis.set_title(
        f"{SWEEP}, or {FEW}" if any(g.few for g in settings.groups) else SWEEP, fontsize=9
    )
    return figure


def _learned(facts: Rows) -> dict[str, Any]:
    before = [f["utility_before"] for f in facts if f["lock"] == DEFORMATION]
    return comparison(
        f"{MODEL} on its own task before a lock, every seed", paper="99 %", ours=f"{min(before):.1%} or more",
        verdict=held_if(min(before) >= LEARNED), accuracy=before,
    )  # fmt: skip


def _kept(facts: Rows, lock: str) -> dict[str, Any]:
    pairs = [(f["utility_before"], f["utility_after"]) for f in facts if f["lock"] == lock]
    lost = max(before - after for before, after in pairs)
    ours = "; ".join(f"{before:.1%} → {after:.1%}" for before, after in pairs)
    return comparison(
        f"{MODEL} on its own task under the lock, {lock}", paper=_own("99 % → 99 %", lock), ours=ours,
        verdict=held_if(lost <= KEPT), accuracy=[list(pair) for pair in pairs], largest_loss=lost,
    )  # fmt: skip


def _control(cells: Sequence[Cell], name: str, goal: str) -> dict[str, Any]:
    cell, best = find(cells, name, PAPER, UNLOCKED), best_of(cells, name, UNLOCKED)
    at = share(cell)
    return comparison(
        f"{TITLES[name]} at {PAPERS[name].learning_rate:g} teaches the unlocked {MODEL} {goal}",
        paper="it does; the largest rate that does", ours=_told(cell), verdict=held_if(at is not None and at >= RESISTED),
        note=f"best: {_told(best)}" if best else "", share_at_the_papers_rate=at, share_best=share(best),
    )  # fmt: skip


def _resisted(cells: Sequence[Cell], name: str, lock: str, goal: str) -> dict[str, Any]:
    there, best = find(cells, name, PAPER, lock), best_of(cells, name, lock)
    control = share(find(cells, name, PAPER, UNLOCKED))
    notes = [_unknown(best)]
    if control is None or control < RESISTED:
        notes.append(f"at the paper's rate the unlocked net does not learn here either: {_percent(control)}")  # fmt: skip
    return comparison(
        f"{TITLES[name]} does not teach the {MODEL} {goal}, {lock}", paper=_own("no training", lock),
        ours=f"{_told(there)}; best: {_told(best)}", verdict=resistance(share(there), share(best)),
        note=_joined(*notes), share_at_the_papers_rate=share(there), share_best=share(best), share_of_the_control=control,
    )  # fmt: skip


def _effective(cells: Sequence[Cell], name: str, goal: str) -> dict[str, Any]:
    best = best_of(cells, name, UNLOCKED)
    return comparison(
        f"{TITLES[name]} teaches the unlocked {MODEL} {goal}, so that it is the lock that stops it", paper="no number",
        ours=_told(best), verdict=held_if((share(best) or 0.0) >= RESISTED), note=_budget(best), share_best=share(best),
    )  # fmt: skip


def _ineffective(cells: Sequence[Cell], name: str, lock: str) -> dict[str, Any]:
    best, control = best_of(cells, name, lock), share(best_of(cells, name, UNLOCKED))
    notes = [_budget(best), _unknown(best)]
    if control is None or control < RESISTED:
        notes.append(f"on the unlocked net it is not effective here either: {_percent(control)}")
    return _at_any_rate(f"{TITLES[name]} is not effective, {lock}", _own("not effective, no number", lock), best, control, notes)  # fmt: skip


def _full_needed(cells: Sequence[Cell], name: str, lock: str) -> dict[str, Any]:
    best, control = best_of(cells, name, lock), share(best_of(cells, name, UNLOCKED))
    return _at_any_rate(
        f"{TITLES[name]}, an approximate preconditioner, does not undo the lock, {lock}",
        _own('not run; "it might be the case that full preconditioning is necessary"', lock), best, control, [_unknown(best)],
    )  # fmt: skip


def _at_any_rate(
    quantity: str, paper: str, best: Cell | None, control: float | None, notes: Sequence[str]
) -> dict[str, Any]:
    """Compare an attack the paper names no rate for: its best decides."""
    at = share(best)
    return comparison(
        quantity, paper=paper, ours=f"{_told(best)}; unlocked {_percent(control)}",
        verdict=held_if(at is not None and at < RESISTED), note=_joined(*notes), share_best=at, share_of_the_control=control,
    )  # fmt: skip


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _own(said: str, lock: str) -> str:
    """Return what the paper says; it does so of its own lock."""
    return said if lock == DEFORMATION else f"of its own lock: {said}"


def _unknown(best: Cell | None) -> str:
    return "" if best else "no sweep of the locked net, so nothing is shown: the unlocked one gained nothing, or was not swept"  # fmt: skip


def _budget(cell: Cell | None) -> str:
    """Say what a run cost, and of how many rates it is the best."""
    if cell is None:
        return ""
    cost = str(cell["task"]).partition(", ")[2]
    return f"{cost}; {FEW}, no sweep" if cell["at"] == FEW else cost


def _told(cell: Cell | None) -> str:
    """Return "share of the gain (accuracy, at rate)" of a cell."""
    if cell is None:
        return "not run"
    accuracy = f"accuracy {cell['accuracy']['mean']:.3f}" if cell["accuracy"] else "diverged"
    rates = ", ".join(f"{r:g}" for r in dict.fromkeys(cell["learning_rates"]))
    return f"{_percent(share(cell))} of the gain ({accuracy}, at {rates})"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{round(value, 2) + 0.0:.0%}"  # no -0 %
