"""Table 1 of papers/001, vision: a ResNet-18 that reads digits is locked, and is to learn pictures, characters and clothes.

At the paper's rate of AdamW, 0.1, and at every other: sweeps go from where training diverges to where nothing moves. Settings of
Appendix B.2.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from specdef.attacks.task import Budget
from specdef.experiments.deformation_measure import Settings as Original
from specdef.experiments.deformation_measure import places, trained
from specdef.experiments.kept import Clock, Kept
from specdef.experiments.lock_table import Rows, unique_rows
from specdef.experiments.paper.conclude import conclude
from specdef.experiments.paper.locks import DEFORMATION, Recipes, lock_all
from specdef.experiments.paper.runs import PAPER, SWEEP, Case, attack_case, summarise
from specdef.experiments.paper.tables import attack_table, lock_table
from specdef.experiments.record import Progress
from specdef.experiments.table1_vision_report import MODEL, comparisons, draw, table
from specdef.experiments.table1_vision_setup import (
    CLOTHES,
    MAIN,
    Settings,
    Target,
    new_task,
    own_task,
    plan_of,
    require_data,
)
from specdef.lock.config import LockConfig
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.load import load_model

SEEDS = {"cpu": 1, "full": 3, "smoke": 1}
"""Seeds unless told otherwise."""

FURTHER = ("full-adadelta", "full-momentum")
ALL = (MAIN, *FURTHER)
EPOCH = Budget(steps=1875, evaluations=5)
"""One epoch of Fashion-MNIST."""


def _recipes(epochs: int, max_utility_loss: float | None, k: int = 25) -> Recipes:
    """Return Algorithm 1 as Appendix B.2 has it, with a patience that outlasts the dips at the full learning rate, and the rest.

    Compensated is the last convolution of every block: 8 layers of ResNet-18, where arXiv 2602.18868 takes 5 to 10, its k and scale.
    """
    return Recipes(
        deformation=DeformationConfig(epochs=epochs, max_utility_loss=max_utility_loss, patience=1000),
        compensated=LockConfig(method="compensated", target_modules=r".*\.layers\.\d+\.layer\.1\.convolution", k=k, scale=1e4),
    )  # fmt: skip


SIZES: dict[str, tuple[Settings, Recipes]] = {
    "cpu": (
        Settings(
            original=Original(
                rows=10_000, epochs=3, retain_rows=10_016, lock_epochs=1, heldout_rows=480, test_rows=1000,
            ),
            targets=(
                Target(name="CIFAR-10", paper=0.80, rows=3200, steps=100, sweep=Budget(steps=90, evaluations=3)),
                Target(name="KMNIST", paper=0.80, rows=3200, steps=100, sweep=Budget(steps=30, evaluations=2)),
                Target(name=CLOTHES, paper=0.74, rows=3200, steps=100, sweep=Budget(steps=24, evaluations=2), further=FURTHER),
            ),
            further_steps=24, sweep_batch_size=16, heldout_rows=300,
        ),
        _recipes(epochs=1, max_utility_loss=0.01),
    ),
    "full": (
        Settings(
            original=Original(rows=60_000, epochs=10, retain_rows=58_000, lock_epochs=10),
            targets=(
                Target(name="CIFAR-10", paper=0.80, rows=50_000, steps=15_620, sweep=EPOCH, sweeps=ALL),
                Target(name="KMNIST", paper=0.80, rows=8000, steps=2500, sweep=EPOCH, sweeps=ALL),
                Target(name=CLOTHES, paper=0.74, rows=60_000, steps=18_750, sweep=EPOCH, sweeps=ALL),
            ),
            evaluations=10, heldout_rows=2000,
        ),
        _recipes(epochs=10, max_utility_loss=0.01),
    ),
    "smoke": (
        Settings(
            original=Original(
                data="digits", rows=960, epochs=3, retain_rows=640, lock_epochs=1, heldout_rows=160, test_rows=500,
                hidden_sizes=(8, 16), depths=(1, 1),
            ),
            targets=(
                Target(name="negatives", paper=0.80, rows=640, steps=20, sweep=Budget(steps=12, evaluations=2)),
                Target(name="rotations", paper=0.80, rows=640, steps=20, sweep=Budget(steps=12, evaluations=2)),
            ),
            further_steps=10, heldout_rows=250,
        ),
        _recipes(epochs=1, max_utility_loss=None, k=4),
    ),
}  # fmt: skip
"""Net, tasks and locks. cpu sweeps AdaDelta and SGD on one task and the deformation only; full takes the paper's ten epochs, and one for sweeps; smoke takes scikit-learn's digits."""


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    data: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, lock, attack and compare, and write table1-vision.json, .png and .md.

    What was made is kept in the cache until the record is written; an interrupted run goes on from there. Trained originals stay.

    Args:
        out: Folder; made if absent.
        seeds: Of the nets and of the pictures drawn.
        size: See `SIZES`.
        data: Folder with cifar10.npz and kmnist_test.npz, and fashion-mnist where Debian's package is not installed; size smoke
            needs none.
        device: Where locks and attacks train; originals train on the CPU.
        progress: Called with a line of text from time to time.

    Returns:
        The record, as JSON values: command, versions, size, seeds, settings, comparisons, claims, summary, table, data.

    Raises:
        SpecDefError: Pictures are missing, cannot be read, or are too few.
    """
    settings, recipes = SIZES[size]
    require_data(settings, data)
    kept = Kept("table1-vision", settings, recipes, device)
    clock = Clock(kept, progress)
    say = clock.say
    rows: Rows = []
    facts: Rows = []
    trainings: Rows = []
    with places(settings.original) as (digits, models):
        for seed in seeds:
            one = _seed(settings, recipes, digits, models, data, seed, device, kept, say)
            for total, part in zip((rows, facts, trainings), one, strict=True):
                total += part
    # Attacks of the paper have more steps than those of sweeps: each is a share of what the unlocked net gains in its own way.
    cells = [cell for at in (PAPER, SWEEP) for cell in summarise([r for r in rows if r["at"] == at])]  # fmt: skip
    found = comparisons(settings, trainings, facts, cells)
    earlier = sum(t["seconds"] for t in trainings if t["earlier"])
    return conclude(
        out, "table1-vision", kept, options={"seeds": seeds, "size": size, "data": data, "device": device},
        seconds=clock.total() + earlier,
        comparisons=found,
        table=[
            *table(settings, trainings, facts, cells),
            *attack_table(cells),
            *attack_table(cells, "recovered"),
            *lock_table(facts),
        ],
        settings={
            "net": asdict(settings), "locks": recipes.to_dict(),
            "attacks": {t.name: asdict(plan_of(settings, t)) for t in settings.targets},
        },
        data={"cells": cells, "rows": rows, "locks": facts, "trainings": trainings}, figure=draw(settings, cells),
    )  # fmt: skip


def _seed(
    settings: Settings, recipes: Recipes, digits: Path | str, models: Path, data: Path | None, seed: int, device: str, kept: Kept,
    say: Progress,
) -> tuple[Rows, Rows, Rows]:  # fmt: skip
    """Return the rows of one seed's attacks, facts of its locks and of its training."""
    began = time.perf_counter()
    folder, training = trained(digits, models, settings.original, seed, say)
    earlier = time.perf_counter() - began < training["seconds"]  # so it was read
    model = load_model(folder, dtype="float32").eval().to(device)
    own = own_task(settings, digits, model, seed)
    locks, facts = lock_all(
        model, recipes, retain=own.retain, heldout=own.heldout, test=own.test, kept=kept, name=f"{MODEL}, seed {seed}", say=say
    )  # fmt: skip
    rows: Rows = []
    for target in settings.targets:
        plan = plan_of(settings, target)
        task, short = (new_task(settings, target, digits, data, model, seed, sweep=s) for s in (False, True))  # fmt: skip
        case = Case(model=MODEL, task=task, original=model, locks=locks, seed=seed, sweep=False)
        rows += attack_case(case, plan, kept, say)
        swept = replace(case, task=short, recipes=False, sweep=True)
        further = replace(swept, locks={DEFORMATION: locks[DEFORMATION]})
        found = attack_case(swept, plan, kept, say)
        found += attack_case(further, replace(plan, sweeps=target.further), kept, say)
        rows += unique_rows(found)  # the reference from scratch is of both
    return rows, facts, [{**training, "seed": seed, "earlier": earlier}]
