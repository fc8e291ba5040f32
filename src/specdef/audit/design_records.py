"""What a search for a design says: its trials, how far it is, and what it found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from specdef.audit.study import json_safe
from specdef.audit.sweeps import Progress
from specdef.lock.config import LockConfig
from specdef.lock.forecast import Expectation


@dataclass(frozen=True, slots=True, kw_only=True)
class DesignTrial:
    """One design, and what became of it.

    Args:
        number: From 0, which is the design the search began from.
        config: The design.
        recovered: Attack to the share of the control's gain it recovers; empty where nothing was measured.
        reason: Why nothing was measured; empty otherwise.
        seconds: Wall time.
    """

    number: int
    config: LockConfig
    recovered: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0

    @property
    def worst(self) -> float:
        """The objective: what the best attack recovers; inf where nothing was measured."""
        return max(self.recovered.values(), default=math.inf)

    @property
    def rank(self) -> tuple[float, float, float, int]:
        """What designs are compared by: the objective, the sum over attacks, the top (low ones quantise best), the number."""
        return self.worst, sum(self.recovered.values()), self.config.top, self.number

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, the objective among them."""
        return dict(
            json_safe({**asdict(self), "config": self.config.to_dict(), "worst": self.worst})
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DesignProgress:
    """How far a search is.

    Args:
        ended: Trials that have ended.
        trials: Trials in all.
        trial: The one that has just ended, or was kept from an earlier search; None while one is under way.
        run: The run that has just ended; None with `trial`.
    """

    ended: int
    trials: int
    trial: DesignTrial | None = None
    run: Progress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DesignSearch:
    """What a search found.

    Args:
        best: The design with the lowest rank.
        trials: All trials, the first of the design the search began from.
        attacks: Attacks that were swept.
        left_out: Attack to why it was not: it does not apply, or learns nothing on the unlocked model in this budget.
        steps: Optimiser steps of a run.
        forecast: Expected slowdowns of `best`, from the proxy task's first batch; empty where they cannot be computed.
        seconds: Wall time, trials kept from earlier included.
    """

    best: LockConfig
    trials: tuple[DesignTrial, ...]
    attacks: tuple[str, ...]
    left_out: Mapping[str, str]
    steps: int
    forecast: tuple[Expectation, ...]
    seconds: float

    @property
    def found(self) -> DesignTrial:
        """The trial of `best`."""
        return min(self.trials, key=lambda trial: trial.rank)

    @property
    def worst(self) -> float:
        """The objective of `best`: the largest share of the control's gain an attack recovers."""
        return self.found.worst

    @property
    def recovered(self) -> Mapping[str, float]:
        """The share of the control's gain that every attack recovers on `best`."""
        return self.found.recovered

    def sentence(self) -> str:
        """Return one sentence for a certificate."""
        untried = sum(bool(trial.reason) for trial in self.trials)
        first = self.trials[0]
        began = (
            f"could not be measured ({first.reason})"
            if first.reason
            else f"leaves {first.worst:.2%}"
        )
        return (
            f"The design was searched: {len(self.trials)} trials{f', {untried} of them not measured' if untried else ''}; of {', '.join(self.attacks)}, "
            f"swept over whole decades of the learning rate with {self.steps} steps on a proxy task, the best recovers {self.worst:.2%} of the unlocked gain; "
            f"the design it began from {began}."
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "best": self.best.to_dict(), "worst": self.worst, "recovered": dict(self.recovered),
            "trials": [trial.to_dict() for trial in self.trials], "attacks": list(self.attacks), "left_out": dict(self.left_out),
            "steps": self.steps, "forecast": json_safe([e.to_dict() for e in self.forecast]), "seconds": self.seconds,
        }  # fmt: skip
