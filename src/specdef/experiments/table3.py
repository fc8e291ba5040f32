"""Table 3 of papers/001: a ResNet-18 unlearns CIFAR-10's cars, is locked, and is taught them again.

At the paper's rate, and at every other: sweeps go from where training diverges to where nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from torch import nn

from specdef.attacks.task import Budget, Setting
from specdef.experiments.kept import Clock, Kept
from specdef.experiments.lock_table import UNLOCKED, Rows
from specdef.experiments.paper.conclude import conclude
from specdef.experiments.paper.locks import Recipes, lock_all
from specdef.experiments.paper.runs import PAPER, SWEEP, Case, Plan, Recipe, attack_case, summarise
from specdef.experiments.paper.tables import attack_table, lock_table
from specdef.experiments.record import Progress
from specdef.experiments.table3_data import Settings, first_rows, others_of, pictures, require_data
from specdef.experiments.table3_report import BEFORE, ORIGINAL, comparisons, draw, table
from specdef.experiments.table3_setup import TOLD_APART, fresh, measures, relearning, train, unlearn
from specdef.lock.deformation.config import DeformationConfig

SEEDS = {"cpu": 1, "full": 3, "smoke": 1}
"""Seeds unless told otherwise."""

MODEL = "ResNet-18"


def _paper(steps: int, evaluations: int) -> Recipe:
    """The paper's attack: SGD at 0.1, for so many steps."""
    return Recipe(setting=Setting(optimizer="sgd", learning_rate=0.1), budget=Budget(steps=steps, evaluations=evaluations))  # fmt: skip


def _deformation(**options: Any) -> DeformationConfig:
    """Algorithm 1 as Appendix B.4 has it; patience outlasts the dips at the full learning rate."""
    return DeformationConfig(retain_weight=0.5, optimizer="adam", gamma=0.7, patience=1000, **options)  # fmt: skip


SIZES: dict[str, tuple[Settings, Recipes, Plan]] = {
    "cpu": (
        Settings(
            rows=20_000, epochs=3, unlearning_steps=90, retain_rows=3200, attack_rows=4800, test_rows=1000, heldout_rows=1500,
        ),
        Recipes(deformation=_deformation(epochs=4, max_utility_loss=None)),
        Plan(recipes=(_paper(150, 3),), sweeps=("full-sgd", "full-adamw"), budget=Budget(steps=30, evaluations=3)),
    ),
    "full": (
        Settings(
            rows=50_000, epochs=30, unlearning_steps=1400, retain_rows=50_000, attack_rows=50_000, test_rows=8000, heldout_rows=2000,
        ),
        Recipes(deformation=_deformation(epochs=10, max_utility_loss=None)),
        Plan(
            recipes=(_paper(1563, 10),), sweeps=("full-sgd", "full-momentum", "full-adamw"),
            budget=Budget(steps=300, evaluations=10), refine=True,
        ),
    ),
    "smoke": (
        Settings(
            data="made", side=16, hidden_sizes=(8, 16), depths=(1, 1), rows=640, training_batch_size=32, epochs=3, learning_rate=5e-3,
            unlearning_steps=40, unlearning_rate=5e-3, retain_rows=320, attack_rows=320, test_rows=200, heldout_rows=200,
        ),
        Recipes(deformation=_deformation(epochs=1, max_utility_loss=None)),
        Plan(recipes=(_paper(20, 2),), sweeps=("full-adamw",), budget=Budget(steps=10, evaluations=2)),
    ),
}  # fmt: skip
"""Net and data, locks, attacks. smoke takes pictures made here; full takes 30 epochs for the original, which the paper downloaded."""


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    data: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, unlearn, lock, attack and compare, and write table3.json and table3.png.

    What was made is kept in the cache until the record is written; an interrupted run goes on from there.

    Args:
        out: Folder; made if absent.
        seeds: Of the nets and of the pictures they are trained on.
        size: See `SIZES`.
        data: Folder with cifar10.npz; size smoke needs none.
        device: Where everything trains.
        progress: Called with a line of text from time to time.

    Returns:
        The record, as JSON values: command, versions, size, seeds, settings, comparisons, claims, summary, table, data.

    Raises:
        SpecDefError: CIFAR-10 is not in the folder, cannot be read, or has too few pictures.
    """
    settings, recipes, plan = SIZES[size]
    require_data(settings, data)
    kept = Kept("table3", settings, recipes, plan, device)
    clock = Clock(kept, progress)
    say = clock.say
    states: Rows = []
    rows: Rows = []
    facts: Rows = []
    trainings: Rows = []
    for seed in seeds:
        one = _seed(settings, recipes, plan, data, seed, device, kept, say)
        for total, part in zip((states, rows, facts, trainings), one, strict=True):
            total += part
    cells = [cell for at in (PAPER, SWEEP) for cell in summarise([r for r in rows if r["at"] == at], TOLD_APART)]  # fmt: skip
    found = comparisons(states, cells)
    return conclude(
        out, "table3", kept, options={"seeds": seeds, "size": size, "data": data, "device": device},
        seconds=clock.total(),
        comparisons=found,
        table=[
            *table(states),
            *attack_table(cells, digits=3),
            *attack_table(cells, "recovered", digits=3),
            *lock_table(facts),
        ],
        settings={"net": asdict(settings), "locks": recipes.to_dict(), "attacks": asdict(plan)},
        data={"states": states, "cells": cells, "rows": rows, "locks": facts, "trainings": trainings}, figure=draw(states),
    )  # fmt: skip


def _seed(
    settings: Settings, recipes: Recipes, plan: Plan, data: Path | None, seed: int, device: str, kept: Kept, say: Progress
) -> tuple[Rows, Rows, Rows, Rows]:  # fmt: skip
    """Return the states of one seed, the rows of its attacks, facts of its locks and of its trainings."""
    name = f"{MODEL}, seed {seed}"
    drawn = pictures(settings, data, seed)
    measured = measures(drawn.test)
    states: Rows = []

    def note(lock: str, model: nn.Module) -> None:
        metrics = kept.once(f"{name}, {lock}: accuracies", lambda: measured(model))
        states.append({"seed": seed, "lock": lock, "at": BEFORE, "attack": None, "status": "finished", "metrics": metrics})  # fmt: skip

    model = fresh(settings, seed).to(device)
    trainings: Rows = []
    steps: dict[str, Callable[..., Mapping[str, Any]]] = {ORIGINAL: train, UNLOCKED: unlearn}
    for state, make in steps.items():
        made = kept.trained(f"{name}, {state}", model, lambda m, f=make: f(m, drawn, settings, seed, lambda line: say(f"seed {seed}: {line}")))  # type: ignore[misc]  # fmt: skip
        trainings.append({"seed": seed, "net": state, **made})
        note(state, model)
    retain = others_of(drawn.train[: settings.retain_rows // settings.batch_size])
    locks, facts = lock_all(
        model, recipes, retain=retain, heldout=first_rows(others_of(drawn.heldout), settings.utility_rows),
        test=others_of(drawn.test), kept=kept, name=name, say=say,
    )  # fmt: skip
    for lock, victim in locks.items():
        note(lock, victim)
    case = Case(
        model=MODEL, task=relearning(drawn, settings), original=model, locks=locks, seed=seed
    )
    start = {state["lock"]: state["metrics"] for state in states}
    rows = [judged(row, start) for row in attack_case(case, plan, kept, say)]
    states += [
        {
            **{key: row[key] for key in ("seed", "lock", "at", "attack", "learning_rate", "loss")},
            "status": row["ended"], "metrics": row["metrics"],
        }
        for row in rows
    ]  # fmt: skip
    return states, rows, facts, trainings


def judged(row: Mapping[str, Any], start: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Judge an attack by the cars it brought back, instead of by held-out accuracy.

    Args:
        row: Of `attack_case`, with the metrics of `measures`.
        start: Those of every net before any attack.

    Returns:
        The row with how its best run `ended`, with `accuracy` on cars and `told_apart`, each None where that run diverged, and
        with both at the start.
    """
    ended = row.get("status") or "finished"
    if row["at"] == SWEEP:
        ended = next(status for rate, status, *_ in row["runs"] if rate == row["learning_rate"])
    metrics = row["metrics"] if ended not in ("diverged", "failed") else None
    own = start.get(row["lock"])
    names = {"accuracy": "car", TOLD_APART: TOLD_APART}
    return {
        **row, "ended": ended, "metrics": metrics,
        **{key: metrics[name] if metrics else None for key, name in names.items()},
        **{f"start_{key}": own[name] if own else None for key, name in names.items()},
    }  # fmt: skip
