"""Table 2 of papers/001: a backdoor into a guard against jailbreaks, unlocked and under three locks.

The guard is MiniLM, fine-tuned here to tell jailbreaks found in the wild from harmless task prompts; texts are classified, never
answered. A backdoor succeeds where at least half of the jailbreaks pass behind the trigger and the guard keeps nine tenths of the
unlocked guard's F1. A guard that calls everything safe, as one does that training has wrecked, is unusable and counted apart: that
is what the paper's asterisk means. The attack runs at the paper's rate, and over a sweep from where training diverges to where
nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from specdef.attacks.task import Budget, Setting
from specdef.experiments.kept import Clock, Kept
from specdef.experiments.lock_table import UNLOCKED, Rows
from specdef.experiments.paper.conclude import conclude
from specdef.experiments.paper.locks import Recipes, lock_all
from specdef.experiments.paper.tables import lock_table
from specdef.experiments.record import Progress
from specdef.experiments.table2_attacks import Attacks, attack_guards
from specdef.experiments.table2_report import cells_of, comparisons, draw, table
from specdef.experiments.table2_setup import (
    Settings,
    fresh_guard,
    prompts,
    require_data,
    train_guard,
)
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.retain import to_device

SEEDS = {"cpu": 1, "full": 3, "smoke": 1}
"""Seeds unless told otherwise."""


def _deformation(**options: Any) -> DeformationConfig:
    """Algorithm 1 as Appendix B.3 has it; k, which it does not name, is 2 as for the paper's texts."""
    # Nor does B.3 name the optimiser. In trials of 12 to 120 steps on MiniLM, adam at 6e-4, rmsprop at 2e-4, adadelta at 1 and sgd
    # at 1 cost the guard much of its F1; adam at 3e-4 does not, and raises singular values by a few per cent.
    fixed = {"retain_weight": 0.9, "k": 2, "retain_loss": "task+kl", "epochs": 3, "lr_schedule": "linear", "max_utility_loss": None}  # fmt: skip
    return DeformationConfig(**{"optimizer": "adam", "learning_rate": 3e-4, **fixed, **options})


SIZES: dict[str, tuple[Settings, Recipes, Attacks]] = {
    "cpu": (
        Settings(length=32, guard_steps=100, retain_texts=160, retain_batch_size=4, test_texts=128, sweep_texts=64),
        Recipes(deformation=_deformation(eval_every=60)),
        Attacks(paper=Budget(steps=80, evaluations=1), sweep=Budget(steps=30, evaluations=2)),
    ),
    "full": (
        Settings(guard_steps=400),
        Recipes(deformation=_deformation()),
        Attacks(stride=1, refine=True),
    ),
    "smoke": (
        Settings(
            guard="made", texts=60, length=24, guard_steps=60, guard_rate=3e-3, retain_texts=48, retain_batch_size=8,
        ),
        Recipes(deformation=_deformation(learning_rate=1e-3, eval_every=9)),
        Attacks(
            paper=Budget(steps=70, evaluations=1), sweep=Budget(steps=12, evaluations=2),
            setting=Setting(learning_rate=1e-3, weight_decay=0.01),
        ),
    ),
}  # fmt: skip
"""Guard and texts, locks, attacks. smoke takes texts made here, and a rate at which so small a guard learns."""


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    data: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the guard, lock it, attack and compare, and write table2.json and table2.png.

    What was made is kept in the cache until the record is written; an interrupted run goes on from there.

    Args:
        out: Folder; made if absent.
        seeds: Of the guard's head, of the texts and of their order.
        size: See `SIZES`.
        data: Folder with the wheel of evals; size smoke needs none.
        device: Where everything trains.
        progress: Called with a line of text from time to time.

    Returns:
        The record, as JSON values: command, versions, size, seeds, settings, comparisons, claims, summary, table, data.

    Raises:
        SpecDefError: The guard or texts are not there, or cannot be read.
    """
    settings, recipes, attacks = SIZES[size]
    require_data(settings, data)
    kept = Kept("table2", settings, recipes, attacks, device)
    clock = Clock(kept, progress)
    say = clock.say
    rows: Rows = []
    facts: Rows = []
    trainings: Rows = []
    for seed in seeds:
        drawn = prompts(settings, data, seed)
        guard = fresh_guard(settings, seed).to(device)
        say(f"seed {seed}: training the guard")
        made = kept.trained(f"guard, seed {seed}", guard, lambda m, d=drawn, s=seed: train_guard(m, d, settings, s))  # type: ignore[misc]  # fmt: skip
        trainings.append({"seed": seed, "texts": drawn.counts, "trigger": drawn.trigger, **made})
        locks, found = lock_all(
            guard, recipes, retain=[to_device(b, guard) for b in drawn.retain], heldout=drawn.sweep, test=drawn.test, kept=kept, name=f"guard, seed {seed}", say=say
        )  # fmt: skip
        facts += found
        rows += attack_guards({UNLOCKED: guard, **locks}, drawn, attacks, seed, kept, say)
    cells = cells_of(rows)
    growth = {f["lock"]: f["growth_median"] for f in facts if "growth_median" in f}
    compared = comparisons(cells, guard=_guard(settings), growth=growth)
    return conclude(
        out, "table2", kept, options={"seeds": seeds, "size": size, "data": data, "device": device},
        seconds=clock.total(),
        comparisons=compared,
        table=[*table(cells), *lock_table(facts)],
        settings={"guard": asdict(settings), "locks": recipes.to_dict(), "attacks": asdict(attacks)},
        data={"cells": list(cells.values()), "rows": rows, "locks": facts, "trainings": trainings}, figure=draw(cells),
    )  # fmt: skip


def _guard(settings: Settings) -> str:
    if settings.guard == "made":
        return "a tiny BERT and texts of random tokens in place of PromptGuard2 and prompts"
    return "MiniLM, fine-tuned on 650 jailbreaks of Shen et al. and as many task prompts, in place of PromptGuard2"
