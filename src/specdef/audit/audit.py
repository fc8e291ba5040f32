"""The audit: every attack on the locked model beside its control, the cheapest first, and a verdict by tier."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import get_args

from torch import nn

from specdef.attacks.attack import Attack
from specdef.attacks.task import Budget, Precision, Task
from specdef.audit.baseline import Baseline, measure_baseline
from specdef.audit.cell import Cell, Reference, learns, make_cell
from specdef.audit.report import AuditReport, Curve
from specdef.audit.storage import open_storage
from specdef.audit.study import SweepResult
from specdef.audit.suite import Entry, Suite, entries, find_suite, with_key
from specdef.audit.sweeps import Progress, Sweeps
from specdef.audit.verdict import TIERS, overall, tier_verdict
from specdef.errors import SpecDefError
from specdef.lock.load import load_model


def audit(
    locked: nn.Module | str | Path,
    original: nn.Module | str | Path,
    task: Task,
    *,
    attacks: Iterable[str | Attack] | None = None,
    tiers: Iterable[int] = range(1, 7),
    budget: Budget | None = None,
    seeds: int | None = None,
    suite: str | Suite = "2026.1",
    dtype: Precision = "float32",
    key: str | Path | None = None,
    storage: str | Path | None = None,
    stop_when_broken: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> AuditReport:
    """Measure how strong a lock is.

    An attack is swept over learning rates on the locked and on the unlocked model, with the same data, budget and seeds. What it
    recovers of the control's gain decides. Studies go on where an earlier audit with the same storage was stopped, and any
    number of processes may work on one storage.

    Args:
        locked: The locked model, never changed; or its folder.
        original: The same model without the lock; or its folder.
        task: What the attacker wants, and the data it is judged on.
        attacks: Attacks, or their names, instead of the suite's; named ones keep the suite's recipes.
        tiers: Threat tiers to test.
        budget: What a run may cost; None takes the suite's.
        seeds: Seeds per side; None takes the suite's.
        suite: Name of the suite, or one of one's own.
        dtype: Precision both sides train in, but for recipes that name their own.
        key: File of the lock's key, for the attack known-scale, which is then run too.
        storage: File or address of a database that keeps the studies; None keeps them in memory.
        stop_when_broken: Skip what is left of a tier that is broken.
        progress: Told after every run.

    Returns:
        The report.

    Raises:
        SpecDefError: There is no such attack or suite, the data does not fit the models, or the key cannot be read.
        ValueError: No seed, a tier outside 1..6, or an unknown dtype.
    """
    began = time.perf_counter()
    recipe = find_suite(suite)
    wanted = sorted(set(tiers))
    if not set(wanted) <= set(TIERS):
        raise ValueError(f"tiers must be in 1..6, got {wanted}.")
    count = recipe.seeds if seeds is None else seeds
    if count < 1:
        raise ValueError(f"seeds must be at least 1, got {count}.")
    if dtype not in get_args(Precision):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Precision))}, got {dtype!r}.")
    chosen: Sequence[str | Attack] | None = None if attacks is None else list(attacks)
    if key is not None:
        chosen = with_key(recipe, chosen, key)
    plan = entries(recipe, chosen, wanted)
    locked, original = _loaded(locked), _loaded(original)
    baseline = measure_baseline(locked, original, task)
    cost = budget or recipe.budget
    sweeps = Sweeps(
        locked, original, task, budget=cost, seeds=count, storage=open_storage(storage), baseline=baseline,
        dtype=dtype, max_trials=recipe.max_trials, whole=recipe.whole_sweeps, refine=recipe.refine, stride=recipe.stride, progress=progress,
    )  # fmt: skip
    sweeps.cells = len(plan)
    curves: list[Curve] = []
    scratch = sweeps.scratch() if plan else []
    if scratch:
        curves.append(_curve("scratch", "adamw", "scratch", scratch))
    reference = Reference(
        start=baseline.start, steps=cost.steps, useless=baseline.useless,
        scratch=fmean(sweep.best.best for sweep in scratch) if scratch else None,
        utility_original=baseline.utility_original, utility_locked=baseline.utility_locked,
    )  # fmt: skip
    cells: list[Cell] = []
    for number, entry in enumerate(plan, start=1):
        sweeps.cell = number
        broken = [c for c in cells if c.tier == entry.tier and c.status == "broken"]
        if broken and stop_when_broken:
            note = f"tier {entry.tier} was broken already, by {broken[0].attack}"
            cells.append(_unrun(entry, "pruned by tier", note))
        else:
            cell, own = _fill(entry, locked, sweeps, reference)
            cells.append(cell)
            curves += own
    verdicts = tuple(tier_verdict(tier, cells) for tier in wanted)
    return AuditReport(
        suite=recipe.name if chosen is None else f"{recipe.name}, own selection", task=task.name, budget=cost,
        seeds=count, dtype=dtype, verdict=overall(verdicts, useless=baseline.useless), tiers=verdicts, cells=tuple(cells),
        curves=tuple(curves), not_tested=_not_tested(cells, wanted, scratch), start=_start(baseline),
        metrics={"original": baseline.metrics_original, "locked": baseline.metrics_locked} if task.metrics else {},
        useless=baseline.useless, versions=_versions(), seconds=time.perf_counter() - began,
    )  # fmt: skip


def _loaded(model: nn.Module | str | Path) -> nn.Module:
    return model if isinstance(model, nn.Module) else load_model(model, dtype="float32")


def _fill(
    entry: Entry, locked: nn.Module, sweeps: Sweeps, reference: Reference
) -> tuple[Cell, list[Curve]]:
    why = entry.attack.applies(locked)
    if why:
        return _unrun(entry, "not applicable", why), []
    try:
        return _swept(entry, sweeps, reference)
    except SpecDefError as error:
        return _unrun(entry, "not applicable", str(error)), []


def _swept(entry: Entry, sweeps: Sweeps, reference: Reference) -> tuple[Cell, list[Curve]]:
    control = sweeps.control(entry)
    rates: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    if entry.tier == 1 and not learns(control, reference.start):
        # The recipe's own rates suit language models; for others the recipe is what works on the unlocked model.
        control = sweeps.control(entry, search=True)
        rates = (min(control, key=lambda s: s.best.best).best.setting.learning_rate,)
        notes = (f"the unlocked model learns nothing at the recipe's rates; its best, {rates[0]:g}, was taken",)  # fmt: skip
    ran: Sequence[SweepResult] = []
    if learns(control, reference.start):
        gain = reference.start - fmean(sweep.best.best for sweep in control)
        ran = sweeps.locked(entry, gain, rates=rates)
    cell = make_cell(entry.name, entry.tier, entry.optimizer, ran, control, reference)
    curves = [_curve(entry.name, entry.optimizer, "control", control)]
    if ran:
        curves.insert(0, _curve(entry.name, entry.optimizer, "locked", ran))
    return replace(cell, notes=(*cell.notes, *notes)), curves


def _unrun(entry: Entry, status: str, note: str) -> Cell:
    return Cell(
        attack=entry.name, tier=entry.tier, optimizer=entry.optimizer, status=status, notes=(note,)  # type: ignore[arg-type]
    )  # fmt: skip


def _curve(attack: str, optimizer: str, side: str, sweeps: Sequence[SweepResult]) -> Curve:
    return Curve(attack=attack, optimizer=optimizer, side=side, sweeps=tuple(sweeps))


def _not_tested(
    cells: Sequence[Cell], wanted: Sequence[int], scratch: Sequence[SweepResult]
) -> tuple[str, ...]:
    """List what was left out: a reader must not take silence for a pass."""
    said = [f"tier {tier} ({name}): not asked for" for tier, name in TIERS.items() if tier not in wanted]  # fmt: skip
    said += [
        f"{cell.attack} with {cell.optimizer}: {'; '.join(cell.notes)}"
        for cell in cells
        if cell.status in ("not applicable", "pruned by tier")
    ]
    said += [
        f"{cell.attack} with {cell.optimizer}: {cell.advice[0]}"
        for cell in cells
        if cell.status == "invalid" and cell.advice
    ]
    if not scratch:
        said.append("the from-scratch reference: no fresh weights can be drawn for this model")
    said.append("budgets larger than this one, other tasks, and attacks not in the suite")
    return tuple(said)


def _start(baseline: Baseline) -> dict[str, float | None]:
    return {
        "original": baseline.original, "locked": baseline.locked, "constant_guess": baseline.chance,
        "counted_from": baseline.start, "utility_original": baseline.utility_original,
        "utility_locked": baseline.utility_locked,
    }  # fmt: skip


def _versions() -> dict[str, str]:
    names = ("specdef", "torch", "optuna", "transformers")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
