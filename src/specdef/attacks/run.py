"""What one run of an attack left behind."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from specdef.attacks.task import Setting

Status = Literal["finished", "diverged", "pruned", "out of time", "failed"]


class Pruned(Exception):
    """Raised by a watcher to end a run that cannot become the best of its sweep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: the held-out loss over its steps, and what it cost.

    Args:
        attack: Name of the attack.
        setting: How it trained.
        seed: Of the order of the batches and of whatever the attack draws.
        steps: Numbers of steps after which the held-out loss was measured, 0 first.
        losses: Held-out loss there, nats per token or sample; inf where it was not finite.
        accuracies: Held-out accuracy there; nan where the task has none.
        status: finished, diverged (a loss was not finite: a result, not an error), pruned, out of time, or failed (the
            attack's own linear algebra broke down).
        utility: Utility on the task's retain data after the attack; None where there is none, or nothing was gained.
        seconds: Wall time of the training, evaluations left out.
        prepare_seconds: Wall time of the edits before it.
        added_parameters: Numbers the attack added to the model.
        trained_parameters: Numbers that trained.
        relative_cost: FLOPs per step over those of plain full training, estimated.
        relative_change: Norm of the change of the trained numbers over their norm.
        swamped: Share of the trained numbers with a gradient in the last step whose stored value never changed: the step
            was smaller than their rounding.
        metrics: The task's own numbers after the attack, by name.
        notes: Sentences the reader should see.
    """

    attack: str
    setting: Setting
    seed: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    status: Status
    utility: float | None = None
    seconds: float = 0.0
    prepare_seconds: float = 0.0
    added_parameters: int = 0
    trained_parameters: int = 0
    relative_cost: float = 1.0
    relative_change: float = 0.0
    swamped: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def start(self) -> float:
        """Held-out loss before training, after the attack's edits."""
        return self.losses[0]

    @property
    def best(self) -> float:
        """Lowest held-out loss seen."""
        return min(self.losses)

    @property
    def gain(self) -> float:
        """By how much the best loss is below the start."""
        return self.start - self.best if math.isfinite(self.start) else 0.0

    def steps_to(self, target: float) -> float:
        """Return the first measured step at which the loss is at most `target`; inf if none is."""
        return next(
            (float(s) for s, loss in zip(self.steps, self.losses, strict=True) if loss <= target),
            math.inf,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON takes once infinite numbers are replaced."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """Read back what `to_dict` gave; None stands for inf among losses, for nan among accuracies.

        Args:
            values: As JSON holds them.

        Returns:
            The run.
        """
        lists = {
            "setting": Setting(**values["setting"]),
            "steps": tuple(values["steps"]),
            "losses": tuple(math.inf if x is None else x for x in values["losses"]),
            "accuracies": tuple(math.nan if x is None else x for x in values["accuracies"]),
            "notes": tuple(values["notes"]),
        }
        return cls(**{**values, **lists})
