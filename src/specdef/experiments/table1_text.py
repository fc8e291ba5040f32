"""Table 1 of papers/001, text: classifiers of paraphrases are locked and taught other tasks on pairs of texts.

At the paper's rate, and at every other: sweeps go from where training diverges to where nothing moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from specdef.attacks.task import Budget, Setting, Task
from specdef.experiments.kept import Clock, Kept
from specdef.experiments.lock_table import Rows
from specdef.experiments.pair_models import (
    DECODER,
    ENCODER,
    EPOCHS,
    RATE,
    WEIGHT_DECAY,
    Amounts,
    Model,
    counted_from,
    deformation,
    prepare,
    require_models,
)
from specdef.experiments.pair_tasks import EASY, GLOSSES, RTE, VERSES, read_tasks
from specdef.experiments.paper.conclude import conclude
from specdef.experiments.paper.locks import Recipes
from specdef.experiments.paper.runs import Case, Plan, Recipe, attack_case
from specdef.experiments.paper.tables import attack_table, draw_attacks, lock_table
from specdef.experiments.record import Progress
from specdef.experiments.table1_text_report import PAPERS, comparisons, own_table, scored
from specdef.lock.deformation.config import DeformationConfig

SEEDS = {"cpu": 3, "full": 3, "smoke": 1}
"""Orders of the batches, unless told otherwise."""

TASKS = (RTE, VERSES, GLOSSES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacks:
    """How often and how long a task is attacked.

    Args:
        model: Its kind.
        task: Its name.
        steps: Of the paper's attack; None takes its three epochs.
        orders: At most so many seeds; None takes all.
        sweep: Steps of a run of a sweep; 0 does not sweep, None takes as many as the paper's attack.
        evaluations: Of the held-out loss in a run.
    """

    model: str
    task: str
    steps: int | None = None
    orders: int | None = None
    sweep: int | None = None
    evaluations: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is run.

    Args:
        models: The models.
        amounts: How many rows.
        deformation: By kind of model.
        attacks: What is attacked.
        made: Random words in place of the tasks.
    """

    models: tuple[Model, ...]
    amounts: Amounts
    deformation: Mapping[str, DeformationConfig]
    attacks: tuple[Attacks, ...]
    made: bool = False


SIZES: dict[str, Settings] = {
    "cpu": Settings(
        models=(
            Model(name="MiniLM-L6", kind=ENCODER, steps=120, rate=1e-4, retain=40, length=32),
            Model(name="SmolLM2-135M, 6 layers", kind=DECODER, layers=6, steps=30, rate=1e-4, retain=8, length=32),
        ),
        amounts=Amounts(heldout=64, test=128),
        deformation={
            ENCODER: deformation(steps=30, eval_every=10, learning_rate=5e-4),
            DECODER: deformation(steps=8, eval_every=4, learning_rate=5e-4),
        },
        attacks=(
            Attacks(model=ENCODER, task=RTE, steps=12, sweep=0, evaluations=2),
            Attacks(model=ENCODER, task=EASY, steps=16, orders=1, sweep=12, evaluations=2),
            Attacks(model=ENCODER, task=VERSES, steps=12, orders=1, sweep=0, evaluations=2),
            Attacks(model=ENCODER, task=GLOSSES, steps=12, orders=1, sweep=0, evaluations=2),
            Attacks(model=DECODER, task=RTE, steps=12, orders=1, sweep=0, evaluations=1),
            Attacks(model=DECODER, task=EASY, steps=24, orders=1, sweep=0, evaluations=2),
        ),
    ),
    "full": Settings(
        models=(
            Model(name="MiniLM-L6", kind=ENCODER, steps=1527, retain=509),
            Model(name="SmolLM2-135M", kind=DECODER, steps=1527, retain=509),
        ),
        amounts=Amounts(heldout=2000, test=1725),
        deformation={ENCODER: deformation(epochs=10), DECODER: deformation(epochs=10)},
        attacks=tuple(Attacks(model=kind, task=task) for kind in (ENCODER, DECODER) for task in TASKS),
    ),
    "smoke": Settings(
        models=(
            Model(name="tiny encoder", kind=ENCODER, tiny=True, steps=20, rate=3e-3, retain=4, length=32),
            Model(name="tiny decoder", kind=DECODER, tiny=True, steps=20, rate=3e-3, retain=4, length=32),
        ),
        amounts=Amounts(train=80, heldout=32, test=32), deformation=dict.fromkeys((ENCODER, DECODER), deformation(steps=4)),
        attacks=tuple(Attacks(model=kind, task=RTE, steps=12, sweep=16, evaluations=2) for kind in (ENCODER, DECODER)), made=True,
    ),
}  # fmt: skip
"""cpu shortens everything, pairs included; full is the paper's, on every row. At cpu some tasks are run at the paper's rate alone."""


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    data: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune, lock, attack and compare, and write table1-text.json and table1-text.png.

    What was made is kept in the cache until the record is written; an interrupted run goes on from there.

    Args:
        out: Folder; made if absent.
        seeds: Of the order of an attack's batches; the first is that of models and rows, too.
        size: See `SIZES`.
        data: Folder with mrpc.jsonl and rte.jsonl; size smoke needs none.
        device: Where everything trains.
        progress: Called with a line of text from time to time.

    Returns:
        The record, as JSON values: command, versions, size, seeds, settings, comparisons, claims, summary, table, data.

    Raises:
        SpecDefError: A file or a model's package is missing, or a file cannot be read.
    """
    settings = SIZES[size]
    wanted = tuple(dict.fromkeys(attack.task for attack in settings.attacks))
    pairs = read_tasks(data, wanted, made=settings.made, seed=seeds[0])
    require_models(settings.models)
    kept = Kept("table1-text", settings, tuple(seeds), sorted(pairs.rows), device)
    clock = Clock(kept, progress)
    say = clock.say
    rows: Rows = []
    facts: Rows = []
    own: Rows = []
    for model in settings.models:
        recipes = Recipes(deformation=settings.deformation[model.kind])
        made = prepare(model, settings.amounts, recipes, pairs, seed=seeds[0], device=device, kept=kept, say=say)  # fmt: skip
        facts += made.facts
        own += [{"model": model.name, "lock": lock, "kind": model.kind, "seconds": 0.0, **found} for lock, found in made.own.items()]  # fmt: skip
        own[-1]["seconds"] = made.trained["seconds"]
        for attack in settings.attacks:
            if attack.model == model.kind and attack.task in made.tasks:
                task = made.tasks[attack.task]
                for seed in seeds[: attack.orders]:
                    case = Case(model=model.name, task=task, original=made.model, locks=made.locks, seed=seed, sweep=attack.sweep != 0 and seed == seeds[0])  # fmt: skip
                    made_rows = attack_case(case, plan(attack, task), kept, say)
                    rows += counted_from(made_rows, made.guesses[task.name])
    cells = scored(rows)
    found = comparisons(own, cells, rows, facts)
    left_out = [f"{task} is left out: {why}" for task, why in pairs.left_out.items()]
    names = {m.name: m.kind for m in settings.models}
    papers = {
        (name, task, lock): value
        for name, kind in names.items()
        for (k, task, lock), value in PAPERS.items()
        if k == kind
    }
    return conclude(
        out, "table1-text", kept, options={"seeds": seeds, "size": size, "data": data, "device": device},
        seconds=clock.total(),
        comparisons=found,
        table=[
            *own_table(own),
            *attack_table(cells, "score"),
            *attack_table(cells, "loss", digits=3),
            *attack_table(cells, "recovered"),
            *lock_table(facts),
            *left_out,
        ],
        settings={"left_out": pairs.left_out, **asdict(settings)},
        data={"own": own, "cells": cells, "rows": rows, "locks": facts}, figure=draw_attacks(cells, papers, quantity="score"),
    )  # fmt: skip


def plan(attack: Attacks, task: Task) -> Plan:
    """Return what is run on every model: the paper's AdamW, and a sweep of AdamW at a constant rate.

    Args:
        attack: How long.
        task: Its batches tell what three epochs are.

    Returns:
        The plan.
    """
    steps = attack.steps or EPOCHS * len(task.train)
    setting = Setting(learning_rate=RATE, schedule="linear", weight_decay=WEIGHT_DECAY)
    return Plan(
        recipes=(Recipe(setting=setting, budget=Budget(steps=steps, evaluations=attack.evaluations)),),
        sweeps=("full-adamw",), budget=Budget(steps=attack.sweep or steps, evaluations=attack.evaluations),
    )  # fmt: skip
