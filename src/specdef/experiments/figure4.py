"""Figure 4 of papers/001: a small CNN that reads MNIST is locked, and preconditioned optimisers teach it CIFAR-10.

Every optimiser at the paper's rate, where the paper gives one, and at every other: sweeps go from where training diverges to
where nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from specdef.experiments.figure4_data import batches_of
from specdef.experiments.figure4_report import best_of_few, comparisons, draw, from_chance
from specdef.experiments.figure4_setup import (
    BATCH_SIZE,
    MODEL,
    PAPERS,
    RAISED,
    SCALE,
    Group,
    Settings,
    fresh,
    locked,
    pictures,
    require,
    task,
)
from specdef.experiments.figure4_train import train
from specdef.experiments.kept import Clock, Kept
from specdef.experiments.lock_table import Rows
from specdef.experiments.paper.conclude import conclude
from specdef.experiments.paper.runs import Case, Plan, attack_case, summarise
from specdef.experiments.paper.tables import attack_table, lock_table
from specdef.experiments.record import Progress

SEEDS = {"cpu": 3, "full": 3, "smoke": 1}
"""Seeds unless told otherwise."""

SIZES: dict[str, Settings] = {
    "cpu": Settings(
        rows=60_000, epochs=3, lock_rows=12_800, lock_epochs=10, heldout_rows=2000, test_rows=10_000,
        groups=(
            Group(steps=400, papers=("sgd", "adamw", "xmat"), sweeps=("sgd", "adamw", "xmat")),
            Group(steps=150, papers=("kron",), sweeps=("kron", "lbfgs", "kfac-1e-3", "kfac-relative")),
            Group(steps=90, batch_size=16, sweeps=("adamw",), few=(("natural-gradient", (0.05, 0.2)),), each=1000),
        ),
    ),
    "full": Settings(
        channels=(16, 32), widths=(128, 64, 64), rows=60_000, epochs=10, lock_rows=58_000, lock_epochs=10, heldout_rows=2000,
        test_rows=10_000,
        groups=(
            Group(steps=15_630, papers=tuple(PAPERS), evaluations=10, each=1000),
            Group(
                steps=1563, sweeps=("sgd", "adamw", "kron", "xmat", "lbfgs", "kfac-1e-3", "kfac-relative"), evaluations=16, each=1000,
            ),
            Group(steps=400, sweeps=("adamw", "natural-gradient"), each=1000),
        ),
    ),
    "smoke": Settings(
        data="digits", channels=(8, 8), kernel=2, widths=(32, 32, 32), rows=1280, epochs=8, lock_rows=960, lock_epochs=1,
        heldout_rows=160, test_rows=500,
        groups=(
            Group(steps=16, papers=tuple(PAPERS), sweeps=("adamw", "kfac-relative"), evaluations=2),
            Group(steps=6, batch_size=8, few=(("lbfgs", (0.1, 1.0)), ("natural-gradient", (0.1,))), evaluations=2),
        ),
    ),
}  # fmt: skip
"""Net, data and attacks. full takes the paper's ten epochs of everything, at the paper's rates; smoke takes scikit-learn's digits."""


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    data: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, lock, attack and compare, and write figure4.json and figure4.png.

    What was made is kept in the cache until the record is written; an interrupted run goes on from there.

    Args:
        out: Folder; made if absent.
        seeds: Of the nets and of the pictures drawn; the first `Settings.swept` are swept.
        size: See `SIZES`.
        data: Folder with cifar10.npz; size smoke needs none.
        device: Where everything trains.
        progress: Called with a line of text from time to time.

    Returns:
        The record, as JSON values: command, versions, size, seeds, settings, comparisons, claims, summary, table, data.

    Raises:
        SpecDefError: CIFAR-10 is not in the folder, a set cannot be read or has too few pictures, or heavyball is missing.
    """
    settings = SIZES[size]
    require(settings, data)
    kept = Kept("figure4", settings, device)
    clock = Clock(kept, progress)
    say = clock.say
    rows: Rows = []
    facts: Rows = []
    trainings: Rows = []
    for place, seed in enumerate(seeds):
        parts = _seed(settings, data, seed, device, kept, say, swept=place < settings.swept)
        for total, part in zip((rows, facts, trainings), parts, strict=True):
            total += part
    cells = summarise(from_chance(rows))
    found = comparisons(facts, cells, settings)
    return conclude(
        out, "figure4", kept, options={"seeds": seeds, "size": size, "data": data, "device": device},
        seconds=clock.total(),
        comparisons=found,
        table=[*attack_table(cells, digits=3), *attack_table(cells, "recovered"), *lock_table(facts)],
        settings={
            **asdict(settings), "papers": {n: s.to_dict() for n, s in PAPERS.items()}, "batch_size": BATCH_SIZE,
            "deformation": settings.deformation(0).to_dict(), "compensated": {"scale": SCALE, "k": RAISED},
        },
        data={"cells": cells, "rows": rows, "locks": facts, "trainings": trainings}, figure=draw(rows, cells, settings),
    )  # fmt: skip


def _seed(
    settings: Settings, data: Path | None, seed: int, device: str, kept: Kept, say: Progress, *, swept: bool
) -> tuple[Rows, Rows, Rows]:  # fmt: skip
    """Return the rows of one seed's attacks, facts of its locks and of its training."""
    drawn = pictures(settings, data, seed, say)
    model = fresh(settings, seed).to(device)
    own, test = batches_of(drawn.own, BATCH_SIZE), batches_of(drawn.own_test, 500)
    made = kept.trained(f"{MODEL}, seed {seed}", model, lambda m: train(m, own, test, settings.epochs, seed, lambda line: say(f"seed {seed}: {line}")))  # fmt: skip
    nets, facts = locked(model, drawn, settings, seed, kept, say)
    rows: Rows = []
    for group in settings.groups:
        sweeps = tuple(f"full-{name}" for name in group.sweeps) if swept else ()
        plan = Plan(recipes=group.recipes(swept=swept), sweeps=sweeps, budget=group.budget)
        case = Case(
            model=MODEL, task=task(settings, drawn, group), original=model, locks=nets, seed=seed
        )
        rows += best_of_few(attack_case(case, plan, kept, say), group)
    return rows, [{**fact, "seed": seed} for fact in facts], [{"seed": seed, **made}]
