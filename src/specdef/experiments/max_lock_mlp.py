"""Designs of the absorbed lock on a small net: an MLP that reads digits, taught to read them with permuted pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from specdef.attacks.task import Budget
from specdef.experiments.max_lock import DESIGNS, MAIN, Plan, Problem, run_table
from specdef.experiments.max_lock_report import FULL, PARTIAL, RESISTING
from specdef.experiments.record import Progress
from specdef.experiments.toy_locks_setup import Net
from specdef.experiments.toy_locks_setup import problem as digits_problem

SEEDS = {"cpu": 3, "smoke": 1}
"""Seeds unless told otherwise."""

TASK = "permuted digits"
ATTACKS = (*FULL, *PARTIAL, *RESISTING)

SIZES: dict[str, tuple[Net, Plan]] = {
    "cpu": (
        Net(),
        Plan(
            attacks=ATTACKS, designs=tuple(d for d in DESIGNS if d != "staggered"), tasks=(TASK,),
            budget=Budget(steps=100, evaluations=20), refine=False,
        ),
    ),
    "smoke": (
        Net(hidden=16, depth=3, rows=512),
        Plan(
            attacks=("full-adamw", "only-embeddings", "rebalance"), designs=MAIN,
            tasks=(TASK,), budget=Budget(steps=16, evaluations=2), refine=False, left_out={"full-muon": "not at this size"},
        ),
    ),
}  # fmt: skip
"""Net, and what is run on it."""


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    size: Literal["cpu", "smoke"] = "cpu",
    attacks: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Lock, attack and compare, and write max-lock-mlp.json, max-lock-mlp.md and max-lock-mlp.png.

    Args:
        out: Folder; made if absent.
        seeds: Of the nets, their data and permutations.
        size: See `SIZES`.
        attacks: Only these rows; what was run stays in the cache. None takes all.
        progress: Called with a line of text for every sweep.

    Returns:
        The record, as JSON values: command, versions, size, settings, seeds, seconds, claims, summary, table, forecast, data.
    """
    net, plan = SIZES[size]

    def problem(_: str, seed: int) -> Problem:
        model, task = digits_problem(net, seed)
        return Problem(original=model, task=task, calibration=list(task.retain))

    return run_table(
        "max_lock_mlp", out, plan, problem, seeds=seeds, size=size, settings=asdict(net), attacks=attacks, progress=progress
    )  # fmt: skip
