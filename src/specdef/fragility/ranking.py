"""Several tasks on one model, ranked by how much alignment each is forecast to cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from scipy.stats import spearmanr  # type: ignore[import-untyped]

from specdef.fragility.report import FragilityReport

# Below this many tasks no p-value is claimed.
_ENOUGH = 5


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RankedTask:
    """One task.

    Args:
        task: Its name.
        forecast: Alignment loss forecast at its last planned step.
        low: Lower edge of the band there.
        high: Upper edge.
        gamma: Its curvature coupling.
        initial_overlap: Its initial overlap.
        observed: Alignment loss of the run at the last step looked at; None without a run, or where it diverged.
        applicable: Whether the forecast may be believed.
    """

    task: str
    forecast: float
    low: float
    high: float
    gamma: float
    initial_overlap: float
    observed: float | None
    applicable: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; null where not finite."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}  # fmt: skip


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRanking:
    """Tasks from the most to the least harmful, by forecast.

    Args:
        tasks: The tasks in that order.
        spearman: Rank correlation of forecast and observation; None unless every task has a run, and for fewer than two.
        p_value: Of no correlation; None for fewer than five tasks.
        steps: Planned steps, the same for all.
    """

    tasks: tuple[RankedTask, ...]
    spearman: float | None
    p_value: float | None
    steps: int

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "tasks": [task.to_dict() for task in self.tasks],
            "num_tasks": self.num_tasks,
            "spearman": self.spearman,
            "p_value": self.p_value,
            "steps": self.steps,
        }


def rank_tasks(reports: Sequence[FragilityReport]) -> TaskRanking:
    """Rank tasks by the alignment loss forecast at the last planned step, and compare with what was observed.

    Args:
        reports: One for each task, of one model, with the same aligned data and number of steps.

    Returns:
        The ranking.

    Raises:
        ValueError: There is no report, or they are not of the same model, aligned data and number of steps.
    """
    if not reports:
        raise ValueError("reports must hold at least one report.")
    first = reports[0]
    for name in ("model", "aligned", "steps"):
        if any(getattr(report, name) != getattr(first, name) for report in reports):
            raise ValueError(f"reports must agree on {name}.")
    tasks = sorted((_ranked(report) for report in reports), key=lambda t: -t.forecast)
    spearman = p_value = None
    observed = [task.observed for task in tasks if task.observed is not None]
    if len(observed) == len(tasks) > 1:
        found = spearmanr([task.forecast for task in tasks], observed)
        if math.isfinite(float(found.statistic)):
            spearman = float(found.statistic)
            p_value = float(found.pvalue) if len(tasks) >= _ENOUGH else None
    return TaskRanking(tasks=tuple(tasks), spearman=spearman, p_value=p_value, steps=first.steps)


def _ranked(report: FragilityReport) -> RankedTask:
    forecast, observed = report.forecast, report.observed
    ran = observed is not None and observed.status == "completed" and observed.alignment
    return RankedTask(
        task=report.task,
        forecast=forecast.alignment[-1],
        low=forecast.low[-1],
        high=forecast.high[-1],
        gamma=report.gamma,
        initial_overlap=report.initial_overlap,
        observed=observed.alignment[-1] if observed is not None and ran else None,
        applicable=forecast.applicable,
    )
