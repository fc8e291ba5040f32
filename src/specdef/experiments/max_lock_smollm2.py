"""Designs of the absorbed lock on SmolLM2-135M-Instruct, designed on one text, taught two others: a novel and program code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from specdef.attacks.task import Budget
from specdef.curvature.losses import LMLoss
from specdef.data.packaged import MODULES, python_source
from specdef.experiments.max_lock import DESIGNS, MAIN, Plan, Problem, run_table
from specdef.experiments.max_lock_report import FULL, PARTIAL, RESISTING
from specdef.experiments.mixed_precision import MixedPrecision
from specdef.experiments.record import Progress
from specdef.experiments.smollm2_locks import Settings
from specdef.experiments.smollm2_locks import problem as text_problem

SEEDS = {"cpu": 1, "full": 3, "smoke": 1}
"""Seeds unless told otherwise."""

TASKS = ("moby-dick", "python")

ROWS = tuple(
    a
    for a in (*FULL, *PARTIAL, *RESISTING)
    if a not in ("only-last-quarter", "only-biases", "only-head") and "kfac" not in a
)
"""The head is the embeddings, and there are no biases."""

SAME = {
    "only-embeddings": "the locked model's gradient is the unlocked one's: the runs are the same (tests/test_max_lock.py)",
    "prompt-tuning": "likewise",
}
"""What trains what a lock cannot reach: nothing is to be measured."""

TOO_DEAR = {"full-muon": "one step orthogonalises every matrix, 1.5e12 multiplications: many seconds on a CPU (size full runs it)"}  # fmt: skip

AGAIN = ("full-adamw", "lora-all")
"""Rows that are run for the second text too, where time is short."""

SIZES: dict[str, tuple[Settings, Plan]] = {
    "cpu": (
        Settings(steps=40, evaluations=4, train=40, heldout=8, calibration=32, batch_size=1, length=64),
        Plan(
            attacks=tuple(a for a in ROWS if a not in TOO_DEAR | SAME), designs=MAIN, tasks=TASKS,
            budget=Budget(steps=40, evaluations=4), refine=False, left_out=TOO_DEAR | SAME, fewer={"python": AGAIN},
            steps=dict.fromkeys(RESISTING, 10),
        ),
    ),
    "full": (
        Settings(steps=300, evaluations=20, train=40, heldout=5, calibration=16),
        Plan(attacks=ROWS, designs=tuple(DESIGNS), tasks=TASKS, budget=Budget(steps=300, evaluations=20), refine=False),
    ),
    "smoke": (
        Settings(steps=12, evaluations=2, train=8, heldout=1, calibration=1, length=24, tiny=True),
        Plan(
            attacks=("full-adamw", "rebalance"), designs=MAIN, tasks=TASKS[:1],
            budget=Budget(steps=12, evaluations=2), refine=False, left_out=TOO_DEAR,
        ),
    ),
}  # fmt: skip
"""How much of the texts, and what is run on them."""


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    attacks: Sequence[str] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Lock, attack and compare, and write max-lock-smollm2.json, max-lock-smollm2.md and max-lock-smollm2.png.

    Args:
        out: Folder; made if absent.
        seeds: Of the drawing of the texts.
        size: See `SIZES`.
        attacks: Only these rows; what was run stays in the cache. None takes all.
        device: Where attacks train.
        progress: Called with a line of text for every sweep.

    Returns:
        The record, as JSON values: command, versions, size, settings, seeds, seconds, claims, summary, table, forecast, data.
    """
    settings, plan = SIZES[size]

    def problem(name: str, seed: int) -> Problem:
        text = python_source() if name == "python" else None
        model, task, calibration = text_problem(settings, seed, name=name, text=text)
        if not settings.tiny:
            task = replace(task, loss=MixedPrecision(LMLoss()))
        return Problem(original=model, task=task, calibration=calibration)

    return run_table(
        "max_lock_smollm2", out, plan, problem, seeds=seeds, size=size, settings={**asdict(settings), "modules": MODULES, "mixed_precision": not settings.tiny},
        attacks=attacks, device=device, progress=progress,
    )  # fmt: skip
