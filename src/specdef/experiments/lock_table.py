"""Tables of attacks by locks: audits of every lock with every seed, put together in means with intervals."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import specdef
from specdef.attacks.registry import find
from specdef.attacks.run import Run
from specdef.attacks.task import Budget, Task
from specdef.audit.report import AuditReport, Curve
from specdef.audit.statistics import mean_interval
from specdef.audit.suite import Suite
from specdef.audit.sweeps import Progress
from specdef.curvature.losses import model_outputs
from specdef.data.cache import cache_dir
from specdef.experiments.record import versions
from specdef.lock.deformation.retain import to_device

UNLOCKED, SCRATCH = "unlocked", "from scratch"
"""Columns beside the locks."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """One lock of one seed, ready to be attacked.

    Args:
        lock: Its name.
        seed: The seed.
        locked: The locked model.
        original: The unlocked one.
        task: What attackers want.
        attacks: Names of attacks.
    """

    lock: str
    seed: int
    locked: nn.Module
    original: nn.Module
    task: Task
    attacks: Sequence[str]


def state_file(name: str, *settings: object) -> Path:
    """Return where an experiment keeps its sweeps until it is finished: in the cache, apart from its results.

    Args:
        name: Of the experiment.
        *settings: Whatever its numbers depend on, beside the versions.

    Returns:
        The path of a journal that need not exist.
    """
    text = json.dumps([versions(), [str(s) for s in settings]])
    return cache_dir() / "experiments" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.journal"  # fmt: skip


def forget(journals: Iterable[Path]) -> None:
    """Remove the state of a finished experiment."""
    for journal in journals:
        for path in (journal, journal.with_name(f"{journal.name}.lock")):
            path.unlink(missing_ok=True)


def audit_rows(
    case: Audited, budget: Budget, journal: Path, say: Callable[[str], None]
) -> tuple[Rows, dict[str, float | None]]:
    """Attack one lock; what its journal knows already is not run again.

    Args:
        case: The lock.
        budget: What a run may cost.
        journal: Keeps every run as soon as it has ended.
        say: Told of every sweep.

    Returns:
        One row for every sweep, as `report_rows` makes them, and the losses before any attack.
    """
    report = audit_case(case, budget, journal, say)
    return report_rows(report, case), report.start


def audit_case(
    case: Audited, budget: Budget, journal: Path, say: Callable[[str], None], *, suite: str | Suite = "2026.1"
) -> AuditReport:  # fmt: skip
    """Attack one lock; what its journal knows already is not run again.

    Args:
        case: The lock.
        budget: What a run may cost.
        journal: Keeps every run as soon as it has ended.
        say: Told of every sweep.
        suite: Says how learning rates are searched.

    Returns:
        The report of one seed.
    """
    seen: set[tuple[str, str]] = set()

    def tell(progress: Progress) -> None:
        key = (progress.attack, progress.side)
        if key not in seen:
            seen.add(key)
            say(f"seed {case.seed}, {case.lock}: {progress.attack} with {progress.optimizer}, {progress.side}")  # fmt: skip

    attacks = [
        copy.copy(attack) for attack in find(case.attacks)
    ]  # without the suite's further recipes
    return specdef.audit(
        case.locked, case.original, case.task, attacks=attacks, budget=budget, seeds=1, storage=journal, suite=suite,
        stop_when_broken=False, progress=tell,
    )  # fmt: skip


def report_rows(report: AuditReport, case: Audited) -> Rows:
    """Put the sweeps of a report into rows.

    Args:
        report: Of one seed.
        case: What was attacked.

    Returns:
        One row for every sweep: those of the locked model, and those of the unlocked one and of fresh weights, which are the
        same for all locks of a seed.
    """
    cells = {(cell.attack, cell.optimizer): cell for cell in report.cells}
    rows: Rows = []
    for curve in report.curves:
        column = {"locked": case.lock, "control": UNLOCKED, "scratch": SCRATCH}[curve.side]
        row = {"seed": case.seed, "lock": column, "attack": curve.attack, "optimizer": curve.optimizer, **_best(curve)}  # fmt: skip
        if curve.side == "locked":
            cell = cells[curve.attack, curve.optimizer]
            row |= {
                "recovered": cell.recovered, "status": cell.status, "flags": list(cell.flags),
                "slowdown": cell.slowdown, "slowdown_censored": cell.slowdown_censored,
            }  # fmt: skip
        rows.append(row)
    return rows


def unique_rows(rows: Iterable[dict[str, Any]]) -> Rows:
    """Keep every sweep once: each lock's audit brings the controls of its seed along."""
    return list({(r["seed"], r["lock"], r["attack"], r["optimizer"]): r for r in rows}.values())


def summarise(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Put the seeds of every attack on every lock together.

    Args:
        rows: Of `audit_rows`, each once.

    Returns:
        One entry for each column, attack and optimiser: seeds, and of accuracy, loss and recovered share the mean, its 95 %
        interval by Student's t, and the values.
    """
    groups: dict[tuple[str, str, str], Rows] = {}
    for row in rows:
        groups.setdefault((row["lock"], row["attack"], row["optimizer"]), []).append(dict(row))
    return [
        {
            "lock": lock, "attack": attack, "optimizer": optimizer, "seeds": [row["seed"] for row in part],
            **{name: _statistics([row.get(name) for row in part]) for name in ("accuracy", "loss", "recovered")},
            "learning_rates": [row["learning_rate"] for row in part],
        }
        for (lock, attack, optimizer), part in groups.items()
    ]  # fmt: skip


def largest_output_difference(first: nn.Module, second: nn.Module, task: Task) -> float:
    """Return the largest difference between the outputs of two models on the first held-out batch of a task.

    Args:
        first: A model.
        second: Another, on the same device.
        task: The task.

    Returns:
        It, in absolute value.
    """
    batch = to_device(task.heldout[0], first)
    with torch.no_grad():
        a, b = (model_outputs(model, batch).float() for model in (first, second))
    return float((a - b).abs().max())


def text_table(
    cells: Sequence[Mapping[str, Any]], columns: Sequence[str], quantity: str, earlier: Mapping[tuple[str, str], str], *,
    digits: int = 2,
) -> list[str]:  # fmt: skip
    """Write the means as a table in Markdown.

    Args:
        cells: Of `summarise`.
        columns: Names of the columns.
        quantity: accuracy, loss or recovered.
        earlier: (attack, column) to what was measured before.
        digits: After the point.

    Returns:
        Lines: "mean ± half of the interval [earlier]".
    """
    found = {(c["attack"], c["lock"]): c[quantity] for c in cells if c[quantity]}
    lines = [f"| attack | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for attack in dict.fromkeys(c["attack"] for c in cells):
        entries = [
            cell_text(found.get((attack, column)), earlier.get((attack, column)), digits=digits)
            for column in columns
        ]
        lines.append(f"| {attack} | {' | '.join(entries)} |")
    return lines


def cell_text(
    statistics: Mapping[str, Any] | None, earlier: str | None = None, *, digits: int = 2
) -> str:
    """Return "mean ± half of the interval [earlier]".

    Args:
        statistics: As `summarise` makes them; None for what was not run.
        earlier: What was measured before; None leaves it out.
        digits: After the point.

    Returns:
        The text.

    >>> cell_text({"mean": 0.5, "interval": [0.25, 0.75], "values": [0.4, 0.6]}, "0.47")
    '0.50 ± 0.25 [0.47]'
    """
    if statistics is None:
        return "–"
    text = f"{statistics['mean']:.{digits}f}"
    if statistics["interval"] is not None:
        text += f" ± {statistics['interval'][1] - statistics['mean']:.{digits}f}"
    return text if earlier is None else f"{text} [{earlier}]"


def _statistics(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return None
    mean, low, high = mean_interval(known)
    return {"mean": mean, "interval": None if math.isnan(low) else [low, high], "values": known}


def _best(curve: Curve) -> dict[str, Any]:
    """Return the best of the sweep of the one seed: the lowest loss, and, of any run, the highest accuracy."""
    (sweep,) = curve.sweeps
    return {
        "loss": sweep.best.best,
        "start_loss": sweep.best.start,
        "start_accuracy": None if math.isnan(sweep.best.accuracies[0]) else sweep.best.accuracies[0],
        "metrics": sweep.best.metrics,
        "utility": sweep.best.utility,
        "accuracy": max(map(_accuracy, sweep.runs)),
        "learning_rate": sweep.best.setting.learning_rate,
        "seconds": round(sum(run.seconds + run.prepare_seconds for run in sweep.runs), 2),
        "prepare_seconds": round(sweep.best.prepare_seconds, 3),
        "runs": [
            [run.setting.learning_rate, run.status, run.steps[-1], round(run.best, 5), round(_accuracy(run), 5)]
            for run in sweep.runs
        ],
    }  # fmt: skip


def _accuracy(run: Run) -> float:
    return max((a for a in run.accuracies if not math.isnan(a)), default=-math.inf)
