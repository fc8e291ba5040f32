"""The search for learning rates as an Optuna sampler: any number of workers on one study, no rate run twice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from specdef.audit.grid import Sweep, Tried, next_rate
from specdef.audit.workers import Watchman

PARAMETER = "learning_rate"
RANGE = FloatDistribution(1e-40, 1e10, log=True)

RETRIES = 2
"""A rate whose worker died so often is not tried again: it may be what kills the workers."""

INTERRUPTED = "interrupted"
"""Mark of a trial that was ended by hand: that says nothing of its rate."""

POLL_SECONDS = 0.05


class LearningRateSampler(BaseSampler):
    """Asks `next_rate`, and ends the study when there is nothing left to try.

    A trial's number is its place in a queue: it chooses after every trial with a lower number has chosen, from what those
    have chosen and found. So two workers never run the same rate, and no lock is held.

    Args:
        sweep: Where the search begins and how fine it becomes.
        watchman: Tells which running trials are dead.
    """

    def __init__(self, sweep: Sweep, watchman: Watchman) -> None:
        self._sweep = sweep
        self._watchman = watchman

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the one parameter."""
        return {PARAMETER: RANGE}

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Choose a rate, waiting for those who choose before, or whose results decide.

        Args:
            study: The study.
            trial: The new trial.
            search_space: Not looked at.

        Returns:
            The rate; nothing where the search is over, and then the study is stopped.
        """
        while True:
            self._watchman.bury(study)
            earlier = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
            choosing = any(
                t.state is TrialState.RUNNING and PARAMETER not in t.params for t in earlier
            )
            if not choosing:
                rate = wanted(earlier, self._sweep)
                if rate is not None:
                    return {PARAMETER: rate}
                if finished(earlier):
                    study.stop()
                    return {}
            time.sleep(POLL_SECONDS)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """End the trial: it is asked for what `sample_relative` did not give, so the search is over.

        Args:
            study: The study.
            trial: The new trial.
            param_name: Not looked at.
            param_distribution: Not looked at.

        Raises:
            optuna.TrialPruned: Always.
        """
        raise optuna.TrialPruned("nothing is left to try")

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Stop the study if this trial was the last it needed, so that no empty one follows.

        Args:
            study: The study.
            trial: What has just ended; it may still be written down as running.
            state: What it ends as.
            values: Not looked at.
        """
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        if state is TrialState.FAIL or PARAMETER not in trial.params:
            return
        if not finished(others):
            return
        if wanted([*others, trial], self._sweep, own=trial) is None:
            study.stop()


def finished(trials: Sequence[FrozenTrial]) -> bool:
    """Tell whether no rate is being run. Trials that wait for one do not count: workers would wait for each other's for ever."""
    return not any(t.state is TrialState.RUNNING and PARAMETER in t.params for t in trials)


def wanted(
    trials: Sequence[FrozenTrial], sweep: Sweep, own: FrozenTrial | None = None
) -> float | None:
    """Return the rate to run next: one that was lost with its worker, else what `next_rate` asks for.

    The search goes on while a worker is dead and not yet known to be, and need not come back to what that one had begun.

    Args:
        trials: All trials that matter.
        sweep: The configuration.
        own: A trial that has just ended, though its state may not say so yet.

    Returns:
        A rate; None if there is none to try.
    """
    known = tried(trials, own)
    taken = {t.rate for t in known}
    for t in trials:
        if t.state is TrialState.FAIL and t.params.get(PARAMETER) not in (None, *taken):
            return float(t.params[PARAMETER])
    return next_rate(known, sweep)


def tried(trials: Sequence[FrozenTrial], own: FrozenTrial | None = None) -> list[Tried]:
    """Return what a study's trials say, in the terms of the search.

    Args:
        trials: Trials; those that failed count only if they failed too often.
        own: A trial that has just ended, though its state may not say so yet.

    Returns:
        One record per rate.
    """
    found: list[Tried] = []
    lost = Counter(
        t.params[PARAMETER]
        for t in trials
        if t.state is TrialState.FAIL and PARAMETER in t.params and INTERRUPTED not in t.user_attrs
    )
    for t in trials:
        if PARAMETER not in t.params or t.state is TrialState.FAIL:
            continue
        rate = t.params[PARAMETER]
        facts = t.user_attrs.get("tried")
        if facts is None or (t.state is TrialState.RUNNING and t is not own):
            found.append(Tried(rate=rate, running=True))
        else:
            facts = {n: float("inf") if v is None else v for n, v in facts.items()}
            found.append(Tried(rate=rate, **facts))
    taken = {t.rate for t in found}
    found += [
        Tried(rate=rate, diverged=True)
        for rate, times in lost.items()
        if times >= RETRIES and rate not in taken
    ]
    return found
