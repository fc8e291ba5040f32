"""The search for a covering design: what the best of a few attacks recovers on a proxy task, made small over top, gap, slack, sides and channel.

A trial locks a copy, sweeps every attack over whole decades beside a control that is run once, and counts the largest share of the
control's gain that is recovered. The first trial is the design the search begins from, so what is found is never worse than that by this
measure. Further ones are proposed by TPE (Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization"), seeded anew for
every trial, so that a search that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from specdef.attacks.attack import Attack
from specdef.attacks.task import Budget, Precision, Task
from specdef.audit.baseline import measure_baseline
from specdef.audit.cell import Reference, learns, make_cell
from specdef.audit.design_records import DesignProgress, DesignSearch, DesignTrial
from specdef.audit.fingerprint import batches_digest, model_digest, study_digest, task_digest
from specdef.audit.storage import open_storage, silent_optuna
from specdef.audit.study import SweepResult
from specdef.audit.suite import Entry, Suite, entries
from specdef.audit.sweeps import Progress, Sweeps
from specdef.errors import SelectionError, SpecDefError
from specdef.lock.calibrate import Batch
from specdef.lock.config import LockConfig
from specdef.lock.deformation.retain import measure_utility, to_device
from specdef.lock.forecast import Expectation, expected_slowdowns
from specdef.lock.in_memory import LockedModel, lock_model

ATTACKS = ("full-adamw", "lora-all", "only-norms")
"""Training of everything, of what is added to every linear layer, and of what is neither: the parts a covering design tells apart."""

RANGES = {"top": (24, 52), "gap": (3, 9), "slack": (0, 10)}
"""Exponent of `scale`, and the two distances in octaves. Above 2^60 Adam's second moment overflows in float32."""

CATEGORIES = {"sides": ("both", "readers"), "channel": ("least-useful", "most-active")}

_SUITE = Suite(name="design", seeds=1, max_trials=40, refine=False)
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)


def search_design(
    model: nn.Module,
    task: Task,
    base: LockConfig,
    *,
    calibration: Iterable[Batch],
    trials: int,
    seed: int = 0,
    attacks: Iterable[str | Attack] = ATTACKS,
    budget: Budget | None = None,
    storage: str | Path | None = None,
    progress: Callable[[DesignProgress], None] | None = None,
) -> DesignSearch:
    """Search for the covering design that leaves the best attack least.

    Cost: a sweep of every attack per trial, on the locked model, and one on the unlocked one; three copies of the model. One
    process at a time may work on a storage.

    Args:
        model: The unlocked model, never changed; attacks train on its device, in float32 or wider.
        task: What attackers want on the proxy data; its retain data and metrics are not measured.
        base: The design to begin from; what is not searched stays as it is there.
        calibration: Batches channels are chosen on; not those of the task.
        trials: Designs in all, `base` included.
        seed: Decides which designs are proposed; attacks run with seed 0.
        attacks: Attacks, or their names; those that do not apply, or learn nothing on the unlocked model, are left out.
        budget: What a run may cost; None takes 10 steps.
        storage: File that keeps the search, which goes on from there if nothing but `trials` has changed; None keeps it in memory.
        progress: Told after every run and every trial.

    Returns:
        The best design and all that were tried.

    Raises:
        SpecDefError: No attack is left, or no design can be measured.
        ValueError: `trials` is below 1, or `base` is no absorbed covering design.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    if (base.method, base.schedule) != ("absorbed", "covering"):
        raise ValueError(f"base must be an absorbed covering design, got {base.method}, {base.schedule}.")  # fmt: skip
    budget = budget or Budget(steps=10, evaluations=5)
    batches, chosen = list(calibration), list(attacks)
    tell = progress or (lambda _: None)
    bench = _Bench(model, replace(task, retain=(), metrics=None), batches, budget, storage)
    name = study_digest(*bench.digests, batches_digest(batches), sorted(base.to_dict().items()), chosen, asdict(budget), seed)  # fmt: skip
    with silent_optuna():
        study = optuna.create_study(storage=bench.storage, study_name=f"specdef/design/{name}", load_if_exists=True)  # fmt: skip
        for stale in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(stale.number, state=TrialState.FAIL)  # its process is gone
    found: list[DesignTrial] = []

    def watch(run: Progress) -> None:
        tell(DesignProgress(ended=len(found), trials=trials, run=run))

    for kept in study.get_trials(deepcopy=False, states=_DONE)[:trials]:
        found.append(_trial(kept, base, len(found)))
        tell(DesignProgress(ended=len(found), trials=trials, trial=found[-1]))
    bench.run_controls(entries(_SUITE, chosen), watch)
    while len(found) < trials:
        with silent_optuna():
            if not found and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                study.enqueue_trial(_parameters(base))
            state = np.random.SeedSequence((seed, len(found))).generate_state(1)
            study.sampler = TPESampler(seed=int(state[0]))
            trial = study.ask()
            config = _design(base, _suggest(trial, base))
        began = time.perf_counter()
        recovered, reason = bench.measure(config, watch)
        trial.set_user_attr("recovered", recovered)
        trial.set_user_attr("reason", reason)
        trial.set_user_attr("seconds", time.perf_counter() - began)
        if reason:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, max(recovered.values()))
        done = study.get_trials(deepcopy=False, states=_DONE)[-1]
        found.append(_trial(done, base, len(found)))
        tell(DesignProgress(ended=len(found), trials=trials, trial=found[-1]))
    best = min(found, key=lambda trial: trial.rank)
    if best.reason:
        raise SelectionError(f"none of {trials} designs can be measured; the first: {found[0].reason}", hint="Use a checkpoint in bfloat16 or float32, or other sites.")  # fmt: skip
    return DesignSearch(
        best=best.config, trials=tuple(found), attacks=tuple(bench.controls), left_out=bench.left_out, steps=budget.steps,
        forecast=bench.forecast(best.config), seconds=sum(trial.seconds for trial in found),
    )  # fmt: skip


class _Bench:
    """Locks by a design and attacks the result; controls are run once, and every run is kept in the storage."""

    def __init__(
        self, model: nn.Module, task: Task, calibration: Sequence[Batch], budget: Budget, storage: str | Path | None
    ) -> None:  # fmt: skip
        wide = any(p.dtype == torch.float64 for p in model.parameters())
        self._dtype: Precision = "float64" if wide else "float32"
        self._device = next(model.parameters()).device
        # Locked as it is stored: whether exponents have room is a matter of that dtype.
        self._stored = copy.deepcopy(model).eval().cpu()
        self._original = self._training(copy.deepcopy(self._stored))
        self._task, self._calibration, self._budget = task, calibration, budget
        self.storage = open_storage(storage)
        self._baseline = measure_baseline(self._original, self._original, task)
        self._reference = Reference(start=self._baseline.start, steps=budget.steps)
        self.controls: dict[str, tuple[Entry, list[SweepResult]]] = {}
        self.left_out: dict[str, str] = {}

    @property
    def digests(self) -> tuple[str, str]:
        """What model and task are told apart by."""
        return model_digest(self._stored), task_digest(self._task)

    def run_controls(self, listed: Sequence[Entry], watch: Callable[[Progress], None]) -> None:
        """Sweep every attack on the unlocked model; raise if none learns anything."""
        sweeps = self._sweeps(self._original, watch)
        sweeps.cells = len(listed)
        for sweeps.cell, entry in enumerate(listed, start=1):
            several = len(entry.attack.optimizers) > 1
            name = f"{entry.name} with {entry.optimizer}" if several else entry.name
            why = entry.attack.applies(self._original)
            if not why:
                try:
                    control = sweeps.control(entry)
                except SpecDefError as error:
                    why = str(error)
                else:
                    if learns(control, self._reference.start):
                        self.controls[name] = entry, control
                        continue
                    why = "the unlocked model learns nothing by it in this budget"
            self.left_out[name] = why
        if not self.controls:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.left_out.items()) or "none given"  # fmt: skip
            raise SpecDefError(f"no attack can be counted ({reasons})", hint="Give more steps, more data, or other attacks.")  # fmt: skip

    def measure(
        self, config: LockConfig, watch: Callable[[Progress], None]
    ) -> tuple[dict[str, float], str]:
        """Return the shares recovered from a design by attack, or none and why."""
        try:
            locked = self._training(self._lock(config).model)
        except SpecDefError as error:
            return {}, str(error)
        loss = measure_utility(locked, self._task.heldout, self._task.loss).loss
        # A model that overflows cannot be trained either, and would look like the best lock of all.
        if not math.isclose(loss, self._baseline.original, rel_tol=1e-6):
            return {}, f"the lock changes what the model computes: held-out loss {loss:.4g} instead of {self._baseline.original:.4g}"  # fmt: skip
        sweeps = self._sweeps(locked, watch)
        sweeps.cells = len(self.controls)
        recovered: dict[str, float] = {}
        for sweeps.cell, (name, (entry, control)) in enumerate(self.controls.items(), start=1):
            gain = self._reference.start - control[0].best.best
            ran = sweeps.locked(entry, gain)
            cell = make_cell(entry.name, entry.tier, entry.optimizer, ran, control, self._reference)
            if cell.recovered is None or "diverged-everywhere" in cell.flags:
                return {}, f"{name}: no learning rate was stable, so nothing is known"
            recovered[name] = cell.recovered
        return recovered, ""

    def forecast(self, config: LockConfig) -> tuple[Expectation, ...]:
        """Return the expected slowdowns of a design."""
        first = to_device(self._task.train[0], self._original)
        scalings = self._lock(config).key.scalings
        try:
            return tuple(expected_slowdowns(self._original, [first], scalings, loss=self._task.loss))  # fmt: skip
        except SpecDefError:  # no second order for this model: the search stands without
            return ()

    def _lock(self, config: LockConfig) -> LockedModel:
        return lock_model(copy.deepcopy(self._stored), config, calibration=self._calibration)

    def _training(self, model: nn.Module) -> nn.Module:
        return model.eval().to(self._device, getattr(torch, self._dtype))

    def _sweeps(self, locked: nn.Module, watch: Callable[[Progress], None]) -> Sweeps:
        return Sweeps(
            locked, self._original, self._task, budget=self._budget, seeds=_SUITE.seeds, storage=self.storage, baseline=self._baseline,
            dtype=self._dtype, max_trials=_SUITE.max_trials, whole=False, refine=_SUITE.refine, stride=_SUITE.stride, progress=watch,
        )  # fmt: skip


def _parameters(config: LockConfig) -> dict[str, Any]:
    """Return a design as the parameters of a trial."""
    return {
        "top": round(math.log2(config.top)), "gap": config.gap, "slack": config.slack, "sides": config.sides, "channel": config.channel,
    }  # fmt: skip


def _suggest(trial: optuna.Trial, base: LockConfig) -> dict[str, Any]:
    """Ask for the parameters of a design; ranges reach as far as the design the search began from."""
    began = _parameters(base)
    numbers = {
        name: trial.suggest_int(name, min(low, began[name]), max(high, began[name]))
        for name, (low, high) in RANGES.items()
    }
    return numbers | {n: trial.suggest_categorical(n, values) for n, values in CATEGORIES.items()}


def _design(base: LockConfig, parameters: Mapping[str, Any]) -> LockConfig:
    if parameters == _parameters(base):
        return base
    fields = {name: value for name, value in parameters.items() if name != "top"}
    return replace(base, scale=2.0 ** parameters["top"], **fields)


def _trial(kept: FrozenTrial, base: LockConfig, number: int) -> DesignTrial:
    return DesignTrial(number=number, config=_design(base, kept.params), **kept.user_attrs)
