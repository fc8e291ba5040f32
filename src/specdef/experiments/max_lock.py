"""Designs of the absorbed lock by attacks: what the strongest one holds, what its parts are for, and what gets through.

Every cell is the best of a sweep of learning rates, from where training diverges to where nothing moves, as the share of
what the same attack gains on the unlocked model. Beside it stands the slowdown that was forecast from gradients and
curvature of the original alone. Targets are in `max_lock_mlp`, `max_lock_resnet` and `max_lock_smollm2`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from specdef.attacks.task import Budget, Task
from specdef.audit.suite import Suite
from specdef.errors import SpecDefError
from specdef.experiments.lock_table import (
    Audited,
    Rows,
    audit_case,
    forget,
    largest_output_difference,
    report_rows,
    state_file,
    unique_rows,
)
from specdef.experiments.max_lock_forecast import predictions
from specdef.experiments.max_lock_plot import draw
from specdef.experiments.max_lock_report import cells_of, claims, correlations, table
from specdef.experiments.record import Progress, make_record, write_record
from specdef.lock.config import LockConfig
from specdef.lock.in_memory import lock_model

DESIGNS: dict[str, LockConfig] = {
    "uniform": LockConfig.preset("uniform"),
    "staggered": LockConfig.preset("staggered"),
    "convex": LockConfig.preset("convex"),
    "max, one-sided": LockConfig.preset("max", sides="readers"),
    "max, no gaps": LockConfig.preset("max", gap=1),
    "max": LockConfig.preset("max"),
}
"""The columns; what stands between convex and max leaves out one part of it."""

MAIN = ("uniform", "max")
"""The columns where time is short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A model and what an attacker wants of it.

    Args:
        original: The unlocked model.
        task: What is to be learned.
        calibration: Batches of the model's own data, which the lock is designed on.
    """

    original: nn.Module
    task: Task
    calibration: Sequence[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is run.

    Args:
        attacks: The rows.
        designs: The columns.
        tasks: Names of the tasks.
        budget: What a run may cost.
        steps: Attack to its own number of steps, for both sides, where one step costs far more than others.
        refine: Sweeps go to quarter decades around the best; otherwise they stay with whole ones.
        left_out: Row to why it is not run at this size.
        fewer: Task to its rows, where not all are run for it.
    """

    attacks: tuple[str, ...]
    designs: tuple[str, ...]
    tasks: tuple[str, ...]
    budget: Budget
    steps: Mapping[str, int] = field(default_factory=dict)
    refine: bool = True
    left_out: Mapping[str, str] = field(default_factory=dict)
    fewer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def budget_of(self, attack: str) -> Budget:
        """Return what a run of a row may cost."""
        steps = self.steps.get(attack, self.budget.steps)
        return replace(self.budget, steps=steps, evaluations=min(self.budget.evaluations, steps))

    def rows(self, only: Sequence[str] | None) -> tuple[str, ...]:
        """Return the rows to be run.

        Args:
            only: Their names; None takes all.

        Returns:
            The names, in the order of the table.

        Raises:
            SpecDefError: There is no such row.
        """
        if only is None:
            return self.attacks
        unknown = [name for name in only if name not in self.attacks]
        if unknown or not only:
            raise SpecDefError(f"no row is called {', '.join(unknown) or 'nothing'}", hint=f"Rows of this size: {', '.join(self.attacks)}.")  # fmt: skip
        return tuple(name for name in self.attacks if name in only)


def run_table(
    experiment: str,
    out: Path,
    plan: Plan,
    problem: Callable[[str, int], Problem],
    *,
    seeds: Sequence[int],
    size: str,
    settings: Mapping[str, Any],
    attacks: Sequence[str] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Lock by every design, attack, forecast and compare, and write NAME.json, NAME.md and NAME.png.

    Every run is kept in the cache as soon as it has ended; what was interrupted goes on from there. Processes that run
    different rows share what they have in common; a run of all rows then puts the table together.

    Args:
        experiment: Name of the module, with underscores.
        out: Folder; made if absent.
        plan: Rows, columns, tasks and budgets.
        problem: Task and seed to the problem.
        seeds: The seeds.
        size: Name of the size.
        settings: What else decides the numbers.
        attacks: Only these rows; what was run stays in the cache. None takes all.
        device: Where attacks train.
        progress: Called with a line of text for every sweep.

    Returns:
        The record, as JSON values.
    """
    name = experiment.replace("_", "-")
    say = progress or (lambda _: None)
    chosen = plan.rows(attacks)
    kept = {"settings": settings, "budget": asdict(plan.budget), "refine": plan.refine}
    rows: Rows = []
    locks: Rows = []
    unrun: dict[tuple[str, str], str] = {(attack, ""): why for attack, why in plan.left_out.items()}
    journals = []
    for task in plan.tasks:
        for seed in seeds:
            journal = state_file(name, kept, task, device, seed)
            journals.append(journal)
            part = [row for row in chosen if row in plan.fewer.get(task, chosen)]
            found, facts, reasons = _measure(plan, part, problem(task, seed), journal, task, seed, device, attacks is None, say)  # fmt: skip
            rows += found
            locks += facts
            unrun |= reasons
    cells = cells_of(rows, plan.tasks)
    numbers = correlations(cells)
    options = {"seeds": seeds, "size": size, **({} if attacks is None else {"attacks": chosen})}
    record = make_record(
        experiment, options if device == "cpu" else {**options, "device": device},
        claims=claims(cells, locks, numbers),
        settings={**settings, "plan": plan.to_dict(), "designs": {d: DESIGNS[d].to_dict() for d in plan.designs}},
        table=table(cells, plan.tasks, plan.designs, unrun), forecast=numbers,
        seconds=sum(row["seconds"] for row in rows),
        data={"cells": cells, "locks": locks, "left_out": [{"attack": a, "lock": d, "why": why} for (a, d), why in unrun.items()], "rows": rows},
    )  # fmt: skip
    write_record(out, name, record, draw(cells, plan.tasks, plan.designs, numbers))
    if attacks is None:
        forget(journals)
    return record


def _measure(
    plan: Plan, attacks: Sequence[str], problem: Problem, journal: Path, task: str, seed: int, device: str, whole: bool, say: Progress
) -> tuple[Rows, Rows, dict[tuple[str, str], str]]:  # fmt: skip
    """Attack every design of one task and seed; return rows of sweeps, one entry for each lock, and what was not run."""
    rows: Rows = []
    locks: Rows = []
    unrun: dict[tuple[str, str], str] = {}
    suite = Suite(name="max-lock", seeds=1, max_trials=100, refine=plan.refine)
    original = problem.original.to(device)
    for design in plan.designs:
        say(f"{task}, seed {seed}: locking by {design}")
        locked = lock_model(copy.deepcopy(original).cpu(), DESIGNS[design], calibration=problem.calibration)  # fmt: skip
        victim = locked.model.to(device)
        # Some rows alone are run to share the work: the run that puts the table together makes the forecasts.
        forecast = (
            predictions(original, problem.task, locked.key.scalings, attacks) if whole else {}
        )
        facts: dict[str, Any] = {}
        for budget in dict.fromkeys(map(plan.budget_of, attacks)):
            part = [attack for attack in attacks if plan.budget_of(attack) == budget]
            case = Audited(lock=design, seed=seed, locked=victim, original=original, task=problem.task, attacks=part)  # fmt: skip
            report = audit_case(case, budget, journal, lambda line: say(f"{task}, {line}"), suite=suite)  # fmt: skip
            found = report_rows(report, case)
            facts |= report.start
            unrun |= {(attack, design): why for attack, why in _unrun(report).items()}
            for row in found:
                row |= {"task": task, "steps": budget.steps}
                if row.get("status") == "invalid":  # no rate was stable, say: that is not held
                    row |= {"recovered": None, "slowdown": None}
                if row["lock"] == design:
                    row["predicted"] = forecast.get(row["attack"])
            rows += found
        difference = largest_output_difference(original, victim, problem.task)
        top = max(edit.exponent for edits in locked.key.scalings.values() for edit in edits)
        locks.append({"task": task, "seed": seed, "lock": design, "output_difference": difference, "top_exponent": top, **facts})  # fmt: skip
    return unique_rows(rows), locks, unrun


def _unrun(report: Any) -> dict[str, str]:
    return {
        cell.attack: "; ".join((*cell.notes, *cell.advice))
        for cell in report.cells
        if cell.status in ("not applicable", "invalid")
    }
