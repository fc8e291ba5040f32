"""Designs of the absorbed lock on a ResNet-18 that reads handwritten digits, taught to tell clothes: MNIST, then Fashion-MNIST.

Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747) has MNIST's format and its ten classes; Debian carries it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from specdef.attacks.task import Budget, Task
from specdef.data.idx import is_idx_folder
from specdef.errors import SpecDefError
from specdef.experiments.deformation_measure import Settings as Original
from specdef.experiments.deformation_measure import batches, places, trained
from specdef.experiments.max_lock import DESIGNS, MAIN, Plan, Problem, run_table
from specdef.experiments.max_lock_report import FULL, PARTIAL, RESISTING
from specdef.experiments.record import Progress
from specdef.lock.load import load_model

SEEDS = {"cpu": 1, "full": 3, "smoke": 1}
"""Seeds unless told otherwise."""

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its four files."""

TASK = "fashion"
ROWS = tuple(a for a in (*FULL, *PARTIAL, *RESISTING) if a != "only-last-four" and "kfac" not in a)


TOO_DEAR = {"full-muon": "one step orthogonalises every matrix (size full runs it)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The original, and how much of the new data is used.

    Args:
        original: How the net is trained; the rest of its settings, of a lock by training, does not matter here.
        batch_size: Pictures of a batch of the attack.
        train: Batches to learn from.
        heldout_rows: Pictures it is judged on.
        calibration: Batches of MNIST that locks are designed on.
    """

    original: Original = field(
        default_factory=lambda: Original(rows=20_000, epochs=5, retain_rows=32, lock_epochs=1)
    )
    batch_size: int = 32
    train: int
    heldout_rows: int
    calibration: int


SIZES: dict[str, tuple[Settings, Plan]] = {
    "cpu": (
        Settings(train=40, heldout_rows=200, calibration=8, batch_size=16),
        Plan(
            attacks=tuple(a for a in ROWS if a not in TOO_DEAR), designs=MAIN, tasks=(TASK,),
            budget=Budget(steps=40, evaluations=4), refine=False, left_out=TOO_DEAR,
        ),
    ),
    "full": (
        Settings(train=300, heldout_rows=2000, calibration=16),
        Plan(attacks=ROWS, designs=tuple(DESIGNS), tasks=(TASK,), budget=Budget(steps=300, evaluations=20)),
    ),
    "smoke": (
        Settings(
            original=Original(data="digits", rows=640, epochs=2, retain_rows=32, lock_epochs=1, test_rows=250, hidden_sizes=(8, 16), depths=(1, 1)),
            train=10, heldout_rows=250, calibration=1,
        ),
        Plan(
            attacks=("full-adamw", "only-norms", "rebalance"), designs=MAIN, tasks=("negatives",),
            budget=Budget(steps=10, evaluations=2), refine=False,
        ),
    ),
}  # fmt: skip
"""Net and data, and what is run on them. smoke takes scikit-learn's digits and their negatives."""


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    attacks: Sequence[str] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, lock, attack and compare, and write max-lock-resnet.json, max-lock-resnet.md and max-lock-resnet.png.

    Args:
        out: Folder; made if absent.
        seeds: Of the nets and of the pictures drawn.
        size: See `SIZES`.
        attacks: Only these rows; what was run stays in the cache. None takes all.
        device: Where attacks train.
        progress: Called with a line of text for every sweep.

    Returns:
        The record, as JSON values: command, versions, size, settings, seeds, seconds, claims, summary, table, forecast, data.

    Raises:
        SpecDefError: Fashion-MNIST is not installed.
    """
    settings, plan = SIZES[size]
    if settings.original.data == "mnist" and not is_idx_folder(FASHION):
        raise SpecDefError(f"Fashion-MNIST is not in {FASHION}.", hint="apt-get install dataset-fashion-mnist")  # fmt: skip
    with places(settings.original) as (data, models):

        def problem(_: str, seed: int) -> Problem:
            return problem_of(settings, data, models, seed, progress or (lambda _: None))

        return run_table(
            "max_lock_resnet", out, plan, problem, seeds=seeds, size=size, settings=asdict(settings), attacks=attacks,
            device=device, progress=progress,
        )  # fmt: skip


def problem_of(settings: Settings, data: Path | str, models: Path, seed: int, say: Progress) -> Problem:  # fmt: skip
    """Return the trained net and what it is taught.

    Args:
        settings: See `Settings`.
        data: Where MNIST lies.
        models: Where trained nets are kept.
        seed: Of the net and of the pictures drawn.
        say: Told of the training.

    Returns:
        Net, task, and the net's own data.
    """
    folder, _ = trained(data, models, settings.original, seed, say)
    model = load_model(folder, dtype="float32").eval()
    size = settings.batch_size
    tests = min(settings.heldout_rows, 250)
    retain = batches(data, model, "test", tests, tests, 0)
    calibration = batches(data, model, "train", size, settings.calibration * size, seed)
    new = data if settings.original.data == "digits" else FASHION
    train = batches(new, model, "train", size, settings.train * size, seed)
    heldout = batches(new, model, "test", tests, settings.heldout_rows, 0)
    if settings.original.data == "digits":
        for batch in (*train, *heldout):
            batch["pixel_values"] = 1 - batch["pixel_values"]
    task = Task(name=TASK, train=train, heldout=heldout, retain=retain)
    return Problem(original=model, task=task, calibration=calibration)
