"""What an audit leaves behind, as data; pages are made of it elsewhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from specdef.attacks.task import Budget, Precision
from specdef.audit.cell import Cell
from specdef.audit.study import SweepResult, json_safe
from specdef.audit.verdict import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The sweeps behind a cell.

    Args:
        attack: Name of the attack.
        optimizer: Name of the optimiser.
        side: locked, control or scratch.
        sweeps: One per seed.
    """

    attack: str
    optimizer: str
    side: str
    sweeps: tuple[SweepResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the runs as JSON values."""
        return {
            "attack": self.attack, "optimizer": self.optimizer, "side": self.side,
            "runs": [
                json_safe(run.to_dict()) | {"trial": number}
                for sweep in self.sweeps
                for run, number in zip(sweep.runs, sweep.trials or range(len(sweep.runs)), strict=True)
            ],
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """The result of an audit.

    Args:
        suite: Name and version of the suite of attacks.
        task: Name of the task.
        budget: What a run may cost.
        seeds: Seeds per side.
        dtype: Precision both sides trained in, but for recipes that name their own.
        verdict: One line.
        tiers: The verdict tier by tier.
        cells: Every attack with every optimiser.
        curves: All runs behind the cells; a control that serves several cells appears under each.
        not_tested: What was left out, and why.
        start: Losses and utilities before any attack.
        metrics: The task's own numbers before any attack, of "original" and "locked"; empty where it has none.
        useless: The locked model does not do its own work any more.
        versions: Of specdef, torch, optuna and Python.
        seconds: Wall time.
    """

    suite: str
    task: str
    budget: Budget
    seeds: int
    dtype: Precision
    verdict: str
    tiers: tuple[Tier, ...]
    cells: tuple[Cell, ...]
    curves: tuple[Curve, ...]
    not_tested: tuple[str, ...]
    start: dict[str, float | None]
    metrics: dict[str, dict[str, float]]
    useless: bool
    versions: dict[str, str]
    seconds: float

    @property
    def broken(self) -> bool:
        """Whether a tier is broken."""
        return any(tier.status == "broken" for tier in self.tiers)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "suite": self.suite, "task": self.task, "budget": asdict(self.budget), "seeds": self.seeds,
            "dtype": self.dtype,
            "verdict": self.verdict, "tiers": [tier.to_dict() for tier in self.tiers],
            "cells": [cell.to_dict() for cell in self.cells],
            "curves": [curve.to_dict() for curve in self.curves], "not_tested": list(self.not_tested),
            "start": json_safe(self.start), "metrics": json_safe(self.metrics), "useless": self.useless, "versions": dict(self.versions),
            "seconds": self.seconds,
        }  # fmt: skip
