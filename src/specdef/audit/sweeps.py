"""The sweeps an audit is made of: names and configurations of studies, controls shared between attacks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from optuna.storages import BaseStorage
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.full import FullTraining
from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.registry import REFERENCE
from specdef.attacks.run import Run
from specdef.attacks.task import Budget, Precision, Setting, Task
from specdef.attacks.trial import has_running_statistics
from specdef.audit.baseline import Baseline
from specdef.audit.fingerprint import model_digest, prepared_digest, study_digest, task_digest
from specdef.audit.grid import Sweep
from specdef.audit.study import SweepResult, run_study
from specdef.audit.suite import Entry
from specdef.errors import SpecDefError
from specdef.lock.deformation.retain import measure_utility
from specdef.lock.randomness import forked_rng


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is being done.

    Args:
        cell: Number of the cell, from 1.
        cells: Cells in all.
        attack: Name of the attack.
        optimizer: Name of the optimiser.
        side: locked, control or scratch.
        seed: The seed.
        learning_rate: Of the run that has ended.
        loss: Its best.
        status: Its status.
    """

    cell: int
    cells: int
    attack: str
    optimizer: str
    side: str
    seed: int
    learning_rate: float
    loss: float
    status: str


class Sweeps:
    """Runs the sweeps of an audit, each once.

    Args:
        locked: The locked model.
        original: The unlocked one.
        task: The task.
        budget: What a run may cost.
        seeds: Seeds per side.
        storage: Where studies are kept.
        baseline: Says what gains count from.
        dtype: Precision of the runs whose recipe names none.
        max_trials: Runs per sweep at most.
        whole: Every seed searches for both ends.
        refine: Sweeps refine around the best.
        stride: Decades between rates below the ordinary range, at first.
        progress: Told after every run.
    """

    def __init__(
        self,
        locked: nn.Module,
        original: nn.Module,
        task: Task,
        *,
        budget: Budget,
        seeds: int,
        storage: BaseStorage,
        baseline: Baseline,
        dtype: Precision,
        max_trials: int,
        whole: bool,
        refine: bool,
        stride: int = 1,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._locked, self._original, self._task = locked, original, task
        self._budget, self._seeds, self._storage = budget, seeds, storage
        self._start, self._max_trials = baseline.start, max_trials
        self._whole, self._refine, self._stride = whole, refine, stride
        self._initial = max(
            x for x in (baseline.start, baseline.original, baseline.locked) if math.isfinite(x)
        )
        self._progress = progress
        self._dtype: Precision = dtype
        self._done: dict[str, SweepResult] = {}
        self._common = (model_digest(original), task_digest(task), asdict(budget))
        self._locked_digest = model_digest(locked)
        self.cell = self.cells = 0

    def control(self, entry: Entry, *, search: bool = False) -> list[SweepResult]:
        """Sweep an attack on the unlocked model; attacks that are the same there share it.

        Args:
            entry: The attack. Where it does not apply to the unlocked model, training all of that is the control.
            search: Search for rates though the attack names its own.

        Returns:
            One sweep per seed; the first alone where it gains nothing at all.
        """
        attack = entry.attack
        digest = "" if attack.applies(self._original) else self._edits(attack)
        if not digest:
            attack = FullTraining((entry.optimizer,), tier=entry.tier)
            digest = self._edits(attack)
        rates = () if search else _rates(entry.attack)
        return self._sides(attack, entry, "control", self._original, digest, rates, None)

    def locked(
        self, entry: Entry, gain: float, *, rates: tuple[float, ...] = ()
    ) -> list[SweepResult]:
        """Sweep an attack on the locked model.

        Args:
            entry: The attack.
            gain: Of the control.
            rates: Only these; empty takes the attack's own, or searches.

        Returns:
            One sweep per seed.
        """
        digest = f"{self._locked_digest}{type(entry.attack).__qualname__}{entry.attack!r}"
        only = rates or _rates(entry.attack)
        return self._sides(entry.attack, entry, "locked", self._locked, digest, only, gain)

    def scratch(self) -> list[SweepResult]:
        """Sweep AdamW on the same architecture with fresh weights.

        Returns:
            One sweep per seed; none where fresh weights cannot be drawn.
        """
        if REFERENCE.applies(self._original):
            return []
        entry = Entry(attack=REFERENCE, optimizer="adamw", tier=REFERENCE.tier, name=REFERENCE.name)
        # What fresh weights gain is seldom below the trained model's start: they are compared with each other.
        with self._prepared(REFERENCE) as prepared:
            fresh = measure_utility(prepared.model, self._task.heldout, self._task.loss).loss
        start = max(self._start, fresh) if math.isfinite(fresh) else self._start
        return self._sides(REFERENCE, entry, "scratch", self._original, "", (), None, start=start)

    def _sides(
        self, attack: Attack, entry: Entry, side: str, model: nn.Module, digest: str,
        rates: tuple[float, ...], gain: float | None, *, start: float | None = None,
    ) -> list[SweepResult]:  # fmt: skip
        start = self._start if start is None else start
        low, high = OPTIMIZERS[entry.optimizer].learning_rates
        found: list[SweepResult] = []
        for seed in range(self._seeds):
            around = None
            if found and not self._whole and not rates:
                around = found[0].best.setting.learning_rate
            sweep = Sweep(low=low, high=high, rates=rates, around=around, gain=gain, max_trials=self._max_trials, refine=self._refine, stride=self._stride)  # fmt: skip
            found.append(self._sweep(attack, entry, side, model, digest, sweep, seed, start))
            if side == "control" and not found[0].best.best < self._start:
                break
        return found

    def _sweep(
        self, attack: Attack, entry: Entry, side: str, model: nn.Module, digest: str, sweep: Sweep, seed: int,
        start: float,
    ) -> SweepResult:  # fmt: skip
        label = "" if side == "control" else entry.name
        recipe = {"dtype": self._dtype, **entry.changes}
        # Start and gain follow from the rest, but for last digits, in which machines differ that share a study.
        settled = replace(sweep, gain=None)
        name = "/".join(
            ("specdef", side, *([label] if label else []), entry.optimizer, f"seed{seed}",
             study_digest(*self._common, digest, sorted(recipe.items()), settled))
        )  # fmt: skip
        if name not in self._done:

            def execute(rate: float, watch: Callable[[int, float], None]) -> Run:
                setting = Setting(optimizer=entry.optimizer, learning_rate=rate, **recipe)
                run = attack(
                    model, self._task, setting, self._budget, seed=seed, original=self._original, watch=watch
                )  # fmt: skip
                self._tell(entry, side, run)
                return run

            def idle() -> Run:
                setting = Setting(optimizer=entry.optimizer, **recipe)
                return attack(model, self._task, setting, self._budget, seed=seed, original=self._original, idle=True)  # fmt: skip

            self._done[name] = run_study(
                self._storage, name, sweep, execute, start=start, initial=max(start, self._initial),
                steps=self._budget.steps, idle=idle if has_running_statistics(model) else None,
            )  # fmt: skip
        return self._done[name]

    def _edits(self, attack: Attack) -> str:
        """Return what an attack makes of the unlocked model; empty where it cannot edit it."""
        if (
            attack.tier == 6
        ):  # trains a model of its own: its recipe tells as much, and costs nothing
            return f"{type(attack).__qualname__}{attack!r}"
        try:
            with self._prepared(attack) as prepared:
                return prepared_digest(prepared)
        except SpecDefError:
            return ""

    @contextmanager
    def _prepared(self, attack: Attack) -> Iterator[Prepared]:
        """Give what an attack makes of the unlocked model, with the first seed; the caller's random state stays as it was."""
        generator = torch.Generator().manual_seed(0)
        with forked_rng(self._original):
            torch.manual_seed(0)
            victim = copy.deepcopy(self._original).eval()
            yield attack.prepare(victim, self._task, original=self._original, generator=generator)

    def _tell(self, entry: Entry, side: str, run: Run) -> None:
        if self._progress:
            self._progress(
                Progress(
                    cell=self.cell, cells=self.cells, attack=entry.name, optimizer=entry.optimizer, side=side,
                    seed=run.seed, learning_rate=run.setting.learning_rate, loss=run.best, status=run.status,
                )
            )  # fmt: skip


def _rates(attack: Attack) -> tuple[float, ...]:
    """Return the only rates of an attack that names them."""
    return tuple(getattr(attack, "learning_rates", None) or ())
