"""One sweep of learning rates as one Optuna study: kept, resumed after a kill, shared by workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from specdef.attacks.run import Pruned, Run
from specdef.audit.grid import Sweep
from specdef.audit.pruner import SweepPruner, blown
from specdef.audit.sampler import (
    INTERRUPTED,
    PARAMETER,
    RANGE,
    LearningRateSampler,
    finished,
    wanted,
)
from specdef.audit.storage import FAILURES, open_storage, silent_optuna
from specdef.audit.workers import Watchman, claim

Execute = Callable[[float, Callable[[int, float], None]], Run]
"""Learning rate and watcher to the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """A finished sweep.

    Args:
        runs: One run per learning rate, the lowest rate first.
        sweep: How rates were searched.
        idle: Step to loss of a run that takes no steps; empty where its loss stays what it is before the first.
        trials: Numbers of the runs in the order they were begun; empty where this was not kept.
        lost: Trials that died with their worker, and were run again.
    """

    runs: tuple[Run, ...]
    sweep: Sweep
    idle: Mapping[int, float] = field(default_factory=dict)
    trials: tuple[int, ...] = ()
    lost: int = 0

    @property
    def best(self) -> Run:
        """The run with the lowest loss; of equal ones, that with the lowest rate."""
        return min(self.runs, key=lambda run: (run.best, run.setting.learning_rate))

    @property
    def steps_run(self) -> int:
        """Optimiser steps the sweep took."""
        return sum(run.steps[-1] for run in self.runs)


def run_study(
    storage: BaseStorage | str | Path | None,
    name: str,
    sweep: Sweep,
    execute: Execute,
    *,
    start: float,
    initial: float,
    steps: int,
    idle: Callable[[], Run] | None = None,
    watchman: Watchman | None = None,
    prune: bool = True,
) -> SweepResult:
    """Search for the best learning rate of one attack, or go on with a search.

    Args:
        storage: Where the study is kept.
        name: Of the study. It must name everything the runs depend on: a study of this name is gone on with.
        sweep: Where the search begins and how fine it becomes.
        execute: Runs the attack at a rate.
        start: Loss the gain counts from.
        initial: Loss before the first step, or a bound above it.
        steps: Steps of a whole run.
        idle: Runs the attack without taking steps, for models that change all the same; None where they do not.
        watchman: Tells which running trials are dead; None takes the usual times.
        prune: Whether runs that cannot become the best are given up.

    Returns:
        All runs, those of other workers among them.
    """
    watchman = watchman or Watchman()
    storage = storage if isinstance(storage, BaseStorage) else open_storage(storage)
    disowned = False
    failure: Exception | None = None

    def objective(trial: optuna.Trial) -> float:
        nonlocal disowned, failure
        try:
            with claim(trial):
                return _trial(trial, execute, start=start, steps=steps, still=still, prune=prune)
        except optuna.exceptions.UpdateFinishedTrialError:
            disowned = True
            raise
        except FAILURES as error:
            failure = error
            raise
        except KeyboardInterrupt:
            trial.set_user_attr(INTERRUPTED, True)
            raise

    with silent_optuna():
        study = optuna.create_study(
            storage=storage, study_name=name, load_if_exists=True, sampler=LearningRateSampler(sweep, watchman)
        )  # fmt: skip
        still = _still(study, idle)
        study.pruner = SweepPruner(start, max((initial, *still.values())), steps)
        while _open(study, sweep, watchman):
            disowned = False
            try:
                study.optimize(objective)
            except Exception as error:
                if failure is not None:  # Optuna stumbles over what it cannot write down
                    raise failure from None
                # Another worker took this one for dead and runs its rate again: the result is dropped.
                known = isinstance(error, ValueError | optuna.exceptions.UpdateFinishedTrialError)
                if not (disowned and known):
                    raise
        trials = study.get_trials(deepcopy=False)
    found = [
        (run_from_json(t.user_attrs["run"]), t.number)
        for t in trials
        if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and "run" in t.user_attrs
    ]
    lost = sum(t.state is TrialState.FAIL for t in trials)
    found.sort(key=lambda pair: pair[0].setting.learning_rate)
    runs, numbers = tuple(run for run, _ in found), tuple(number for _, number in found)
    return SweepResult(runs=runs, sweep=sweep, idle=still, trials=numbers, lost=lost)


def json_safe(value: Any) -> Any:
    """Return a value with None in place of numbers JSON does not know.

    Args:
        value: Nested dicts, lists, tuples, numbers and strings.

    Returns:
        The same with lists for tuples.

    >>> json_safe({"losses": (1.0, float("inf"))})
    {'losses': [1.0, None]}
    """
    if isinstance(value, dict):
        return {str(name): json_safe(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def run_from_json(values: dict[str, Any]) -> Run:
    """Read back a run that `json_safe` has written.

    Args:
        values: `json_safe(run.to_dict())`.

    Returns:
        The run.
    """
    change = values["relative_change"]
    return Run.from_dict(values | {"relative_change": math.inf if change is None else change})


def facts(run: Run, idle: Mapping[int, float], *, start: float, steps: int) -> dict[str, Any]:
    """Return what the search wants to know of a run.

    Args:
        run: The run.
        idle: Step to loss of a run that takes no steps; empty where that is the loss before the first one.
        start: Loss the gain counts from.
        steps: Steps of a whole run.

    Returns:
        Fields of `Tried`.
    """
    last = run.losses[-1]
    still = run.relative_change == 0
    without = [idle.get(step, run.start) for step in run.steps]
    given_up = run.status == "pruned" and last > blown(without[-1]) and not still
    return {
        "start": start,
        "initial": without[-1],
        "lowest": min(without),
        "best": run.best,
        "last": last,
        "diverged": run.status in ("diverged", "failed") or given_up or not math.isfinite(run.best),
        "still": still,
        "share": max(run.steps[-1], 1) / steps,
    }


def _open(study: optuna.Study, sweep: Sweep, watchman: Watchman) -> bool:
    """Tell whether a study has anything left to run or to wait for."""
    watchman.bury(study)
    trials = study.get_trials(deepcopy=False)
    return not finished(trials) or wanted(trials, sweep) is not None


def _still(study: optuna.Study, idle: Callable[[], Run] | None) -> dict[int, float]:
    """Return the losses of a run without steps, by step; it is run once."""
    if idle is None:
        return {}
    if "idle" not in study.user_attrs:
        run = idle()
        study.set_user_attr("idle", [[s, x] for s, x in zip(run.steps, run.losses, strict=True) if math.isfinite(x)])  # fmt: skip
    return dict(study.user_attrs["idle"])


def _trial(
    trial: optuna.Trial, execute: Execute, *, start: float, steps: int, still: Mapping[int, float], prune: bool
) -> float:  # fmt: skip
    rate = trial.suggest_float(PARAMETER, RANGE.low, RANGE.high, log=True)

    def watch(step: int, loss: float) -> None:
        trial.report(loss, step)
        if prune and trial.should_prune():
            raise Pruned

    run = execute(rate, watch)
    trial.set_user_attr("run", json_safe(run.to_dict()))
    trial.set_user_attr("tried", json_safe(facts(run, still, start=start, steps=steps)))
    if run.status == "pruned":
        raise optuna.TrialPruned
    return run.best
