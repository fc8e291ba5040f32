"""The paper's attack at its one learning rate, beside the best of a whole sweep, on the unlocked model and every lock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from specdef.attacks.attack import Attack
from specdef.attacks.full import FullTraining
from specdef.attacks.run import Run
from specdef.attacks.task import Budget, Setting, Task
from specdef.audit.statistics import mean_interval
from specdef.audit.suite import Suite
from specdef.experiments.kept import Kept
from specdef.experiments.lock_table import (
    UNLOCKED,
    Audited,
    Rows,
    audit_case,
    report_rows,
    unique_rows,
)
from specdef.experiments.record import Progress

PAPER, SWEEP = "paper's rate", "best over the sweep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """An attack as a paper made it.

    Args:
        setting: Optimiser, its one learning rate, schedule.
        budget: What it may cost.
        attack: What trains; None is every parameter.
    """

    setting: Setting
    budget: Budget
    attack: Attack | None = None

    @property
    def attacker(self) -> Attack:
        """The attack."""
        return self.attack or FullTraining((self.setting.optimizer,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run on every model.

    Args:
        recipes: The paper's attacks.
        sweeps: Names of attacks in the registry whose rates are swept from where training diverges to where nothing moves.
        budget: What a run of a sweep may cost.
        refine: Sweeps go to quarter decades around the best; otherwise they stay with whole ones.
    """

    recipes: Sequence[Recipe]
    sweeps: Sequence[str]
    budget: Budget
    refine: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model and task of one seed.

    Args:
        model: Its name in the tables.
        task: What attackers want; its name names the table.
        original: Unlocked.
        locks: Locked models by name.
        seed: Of the order of the batches.
        goal: The metric of the task that tables are about; "accuracy" is that on held-out data.
        recipes: Run the paper's attacks.
        sweep: Sweep, too.
    """

    model: str
    task: Task
    original: nn.Module
    locks: Mapping[str, nn.Module] = field(default_factory=dict)
    seed: int = 0
    recipes: bool = True
    sweep: bool = True


def attack_case(case: Case, plan: Plan, kept: Kept, say: Progress) -> Rows:
    """Attack the unlocked model and every lock; what was run before is not run again.

    Args:
        case: The model, its locks and the task.
        plan: What is run.
        kept: The state of the experiment.
        say: Told of every run.

    Returns:
        One row for every attack, model and lock: `at` says whether it is the paper's rate or the best of a sweep; accuracy
        (of the last evaluation for the paper's, the highest for a sweep; None where there is none), loss (lowest), start
        values, learning rate, status, metrics of the task after the attack, all runs of a sweep.
    """
    rows: Rows = []
    where = {"model": case.model, "task": case.task.name}
    models = {UNLOCKED: case.original, **case.locks}
    for recipe in plan.recipes if case.recipes else ():
        attack = recipe.attacker
        for lock, victim in models.items():
            name = f"{case.model}, {case.task.name}, seed {case.seed}, {lock}: {attack.name} with {recipe.setting.optimizer} at {recipe.setting.learning_rate:g}"  # fmt: skip

            def run(attack: Attack = attack, victim: nn.Module = victim, recipe: Recipe = recipe, name: str = name) -> dict[str, Any]:  # fmt: skip
                say(name)
                made = attack(victim, case.task, recipe.setting, recipe.budget, seed=case.seed, original=case.original)  # fmt: skip
                return _row(made)

            row = kept.once(f"{name}, {recipe.budget}", run)
            rows.append({**where, "seed": case.seed, "lock": lock, "attack": attack.name, "optimizer": recipe.setting.optimizer, "at": PAPER, **row})  # fmt: skip
    if case.sweep and plan.sweeps:
        suite = Suite(name="paper", seeds=1, max_trials=60, refine=plan.refine)
        for lock, victim in case.locks.items():
            audited = Audited(lock=lock, seed=case.seed, locked=victim, original=case.original, task=case.task, attacks=plan.sweeps)  # fmt: skip
            report = audit_case(audited, plan.budget, kept.journal, lambda line: say(f"{case.model}, {case.task.name}, {line}"), suite=suite)  # fmt: skip
            rows += [{**where, "at": SWEEP, **row} for row in report_rows(report, audited)]
    papers = [row for row in rows if row["at"] == PAPER]
    return papers + [dict(row) for row in unique_rows(row for row in rows if row["at"] == SWEEP)]


def _row(run: Run) -> dict[str, Any]:
    known = [a for a in run.accuracies if not math.isnan(a)]
    return {
        "loss": run.best, "final_loss": run.losses[-1], "start_loss": run.start,
        "accuracy": run.accuracies[-1] if not math.isnan(run.accuracies[-1]) else None,
        "best_accuracy": max(known, default=None), "start_accuracy": known[0] if known else None,
        "learning_rate": run.setting.learning_rate, "status": run.status, "utility": run.utility, "metrics": run.metrics,
        "seconds": round(run.seconds + run.prepare_seconds, 2), "steps": run.steps[-1],
        "curve": [list(point) for point in zip(run.steps, run.losses, run.accuracies, strict=True)],
    }  # fmt: skip


def summarise(rows: Rows, quantity: str = "accuracy") -> Rows:
    """Put the seeds of every attack on every lock together, with the share of the unlocked gain it recovers.

    The share compares with the best the unlocked model reaches by any attack on that task with that seed, from its start: what
    somebody gains who tries everything. A seed that was not swept is compared with the sweeps of those that were, too.

    Args:
        rows: Of `attack_case`.
        quantity: What is gained: "accuracy", or "loss", which falls.

    Returns:
        One entry for each model, task, attack, way and lock: mean, interval and values of accuracy, loss and share; statuses
        and learning rates.
    """
    shares = [_share(row, rows, quantity) for row in rows]
    groups: dict[tuple[str, ...], list[tuple[dict[str, Any], float | None]]] = {}
    for row, share in zip(rows, shares, strict=True):
        key = tuple(row[n] for n in ("model", "task", "attack", "optimizer", "at", "lock"))
        groups.setdefault(key, []).append((row, share))
    return [
        {
            **dict(zip(("model", "task", "attack", "optimizer", "at", "lock"), key, strict=True)),
            "seeds": [row["seed"] for row, _ in part],
            **{n: statistics([row.get(n) for row, _ in part]) for n in ("accuracy", "loss")},
            "recovered": statistics([share for _, share in part]),
            "learning_rates": [row["learning_rate"] for row, _ in part],
            "statuses": [row.get("status") or "" for row, _ in part],
        }
        for key, part in groups.items()
    ]  # fmt: skip


def statistics(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Return mean, 95 % interval by Student's t (None with one value) and the values that are known; None where none is.

    Args:
        values: Numbers; None, infinite and undefined ones are left out.

    Returns:
        The entry.
    """
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return None
    mean, low, high = mean_interval(known)
    return {"mean": mean, "interval": None if math.isnan(low) else [low, high], "values": known}


def _share(row: Mapping[str, Any], rows: Rows, quantity: str) -> float | None:
    same = [r for r in rows if all(r[n] == row[n] for n in ("model", "task", "seed"))]
    control = [r for r in same if r["lock"] == UNLOCKED]
    starts = [r[f"start_{quantity}"] for r in control if r.get(f"start_{quantity}") is not None]
    sign = -1 if quantity == "loss" else 1
    rivals = [*control, *_sweeps_for(control, row, rows)]
    best = max((sign * r[quantity] for r in rivals if r.get(quantity) is not None), default=None)
    if not starts or best is None or not best > sign * starts[0]:
        return None
    value = row.get(quantity)
    if value is None or not math.isfinite(value):
        return 0.0  # it diverged: nothing was gained
    share: float = (sign * value - sign * starts[0]) / (best - sign * starts[0])
    return share


def _sweeps_for(control: Rows, row: Mapping[str, Any], rows: Rows) -> Rows:
    """Return the other seeds' sweeps of the unlocked model, where its own seed was not swept."""
    if any(r["at"] == SWEEP for r in control):
        return []
    where = {"model": row["model"], "task": row["task"], "lock": UNLOCKED, "at": SWEEP}
    return [r for r in rows if all(r[n] == value for n, value in where.items())]
