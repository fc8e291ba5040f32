"""Figure 3 of papers/001: a lock over learning rates. The encoder of Table 1, fine-tuned on MRPC, unlocked and under every lock.

AdamW at the paper's rates, 1e-3 to 1e-8, a decade apart; beside it a sweep from where training diverges to where nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from specdef.attacks.task import Budget, Setting, Task
from specdef.experiments.figure3_report import RATES, comparisons, curves, draw, rate_table
from specdef.experiments.kept import Clock, Kept
from specdef.experiments.lock_table import Rows
from specdef.experiments.pair_models import (
    ENCODER,
    EPOCHS,
    WEIGHT_DECAY,
    Amounts,
    Model,
    counted_from,
    deformation,
    prepare,
    require_models,
)
from specdef.experiments.pair_tasks import EASY, RTE, read_tasks
from specdef.experiments.paper.conclude import conclude
from specdef.experiments.paper.locks import Recipes
from specdef.experiments.paper.runs import Case, Plan, Recipe, attack_case
from specdef.experiments.paper.tables import lock_table
from specdef.experiments.record import Progress
from specdef.lock.deformation.config import DeformationConfig

SEEDS = {"cpu": 1, "full": 3, "smoke": 1}
"""Orders of the batches, unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is run.

    Args:
        model: The model.
        amounts: How many rows.
        deformation: The paper's lock.
        steps: Of the paper's attack by task; None takes its three epochs.
        sweep: Steps of a run of a sweep by task, for the first seed; 0 does not sweep, None takes as many as the attack.
        evaluations: Of the held-out loss in a run.
        made: Random words in place of the tasks.
    """

    model: Model
    amounts: Amounts
    deformation: DeformationConfig
    steps: dict[str, int | None]
    sweep: dict[str, int | None]
    evaluations: int
    made: bool = False


SIZES: dict[str, Settings] = {
    "cpu": Settings(
        model=Model(name="MiniLM-L6", kind=ENCODER, steps=120, rate=1e-4, retain=40, length=32),
        amounts=Amounts(heldout=64, test=128), deformation=deformation(steps=30, eval_every=10, learning_rate=5e-4),
        steps={RTE: 12, EASY: 16}, sweep={RTE: 0, EASY: 12}, evaluations=2,
    ),
    "full": Settings(
        model=Model(name="MiniLM-L6", kind=ENCODER, steps=1527, retain=509), amounts=Amounts(heldout=2000, test=1725),
        deformation=deformation(epochs=10), steps={RTE: None, EASY: None}, sweep={RTE: None, EASY: None}, evaluations=10,
    ),
    "smoke": Settings(
        model=Model(name="tiny encoder", kind=ENCODER, tiny=True, steps=20, rate=3e-3, retain=4, length=32),
        amounts=Amounts(train=80, heldout=32, test=32), deformation=deformation(steps=4), steps={RTE: 12}, sweep={RTE: 16},
        evaluations=2, made=True,
    ),
}  # fmt: skip
"""cpu shortens everything, pairs included, and sweeps what can be learned in that time; full is the paper's, on every row."""


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    data: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune, lock, attack at every rate and compare, and write figure3.json and figure3.png.

    What was made is kept in the cache until the record is written; an interrupted run goes on from there.

    Args:
        out: Folder; made if absent.
        seeds: Of the order of an attack's batches; the first is that of model and rows, too.
        size: See `SIZES`.
        data: Folder with mrpc.jsonl and rte.jsonl; size smoke needs none.
        device: Where everything trains.
        progress: Called with a line of text from time to time.

    Returns:
        The record, as JSON values: command, versions, size, seeds, settings, comparisons, claims, summary, table, data.

    Raises:
        SpecDefError: A file or the model's package is missing, or a file cannot be read.
    """
    settings = SIZES[size]
    pairs = read_tasks(data, tuple(settings.steps), made=settings.made, seed=seeds[0])
    require_models([settings.model])
    kept = Kept("figure3", settings, tuple(seeds), sorted(pairs.rows), device)
    clock = Clock(kept, progress)
    say = clock.say
    recipes = Recipes(deformation=settings.deformation)
    made = prepare(settings.model, settings.amounts, recipes, pairs, seed=seeds[0], device=device, kept=kept, say=say)  # fmt: skip
    rows: Rows = []
    for name, task in made.tasks.items():
        for seed in seeds:
            case = Case(
                model=settings.model.name, task=task, original=made.model, locks=made.locks, seed=seed,
                sweep=settings.sweep[name] != 0 and seed == seeds[0],
            )  # fmt: skip
            rows += counted_from(attack_case(case, plan(settings, task), kept, say), made.guesses[name])  # fmt: skip
    found = curves(rows)
    compared = comparisons(found, made.facts)
    return conclude(
        out, "figure3", kept, options={"seeds": seeds, "size": size, "data": data, "device": device},
        seconds=clock.total(),
        comparisons=compared,
        table=[
            *rate_table(found, "loss", 3),
            *rate_table(found, "accuracy", 2),
            *rate_table(found, "share", 2),
            *lock_table(made.facts),
            *(f"{task} is left out: {why}" for task, why in pairs.left_out.items()),
        ],
        settings={"left_out": pairs.left_out, **asdict(settings)},
        data={"curves": found, "rows": rows, "own": made.own, "locks": made.facts}, figure=draw(found),
    )  # fmt: skip


def plan(settings: Settings, task: Task) -> Plan:
    """Return what is run on every model: the paper's AdamW at each of its rates, and a sweep of AdamW at a constant rate.

    Args:
        settings: How long.
        task: Its batches tell what three epochs are.

    Returns:
        The plan.
    """
    steps = settings.steps[task.name] or EPOCHS * len(task.train)
    budget = Budget(steps=steps, evaluations=settings.evaluations)
    recipes = tuple(
        Recipe(setting=Setting(learning_rate=rate, schedule="linear", weight_decay=WEIGHT_DECAY), budget=budget)
        for rate in RATES
    )  # fmt: skip
    swept = Budget(steps=settings.sweep[task.name] or steps, evaluations=settings.evaluations)
    return Plan(recipes=recipes, sweeps=("full-adamw",), budget=swept)
