"""What an attacker wants a model to learn, what it may cost, and with which recipe it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from specdef.curvature.losses import Batch, Loss

Schedule = Literal["constant", "linear", "cosine"]
Precision = Literal["float32", "bfloat16", "float64"]
Metrics = Callable[[nn.Module], dict[str, float]]
"""A model to the numbers of a goal by name, each a fraction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the attacker wants the model to learn, and how it is judged.

    Args:
        name: Named in reports.
        train: Batches to learn from, cycled in an order that the seed decides.
        heldout: Batches the attack is judged on; the attack never sees them.
        retain: The model's own behaviour: utility after the attack is measured on it. Empty measures none.
        loss: None takes what suits model and labels.
        metrics: Further numbers to measure after an attack; None measures none.

    Raises:
        ValueError: There is nothing to learn from, or nothing to judge on.
    """

    name: str
    train: Sequence[Batch]
    heldout: Sequence[Batch]
    retain: Sequence[Batch] = ()
    loss: Loss | None = None
    metrics: Metrics | None = None

    def __post_init__(self) -> None:
        for name in ("train", "heldout"):
            if not len(getattr(self, name)):
                raise ValueError(f"task {self.name}: {name} must hold at least one batch.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one run of an attack may cost.

    Args:
        steps: Optimiser steps.
        evaluations: How often the held-out loss is measured, the end included, the start not.
        seconds: Wall time after which a run ends at its next evaluation; None sets no limit.

    Raises:
        ValueError: A number is too small.
    """

    steps: int = 8
    evaluations: int = 4
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def evaluated_after(self) -> frozenset[int]:
        """Numbers of steps after which the held-out loss is measured, evenly spread, the last among them."""
        count = min(self.evaluations, self.steps)
        return frozenset(-(-self.steps * i // count) for i in range(1, count + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How an attacker trains: one point of a sweep.

    Args:
        optimizer: Name in `specdef.attacks.optimizers.OPTIMIZERS`.
        learning_rate: Of the first step after the warm-up.
        schedule: constant, or linear or cosine down to 0 at the end of the budget.
        warmup: Fraction of the steps over which the rate rises from 0.
        max_grad_norm: Norm gradients are clipped to; None does not clip.
        weight_decay: As the optimiser takes it.
        batch_fraction: Part of each batch's rows that is used.
        dtype: Precision weights and activations are held in.

    Raises:
        ValueError: A number is out of range.
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    schedule: Schedule = "constant"
    warmup: float = 0.0
    max_grad_norm: float | None = None
    weight_decay: float = 0.0
    batch_fraction: float = 1.0
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}.")
        if not 0 < self.batch_fraction <= 1:
            raise ValueError(f"batch_fraction must be in (0, 1], got {self.batch_fraction}.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {self.max_grad_norm}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)
