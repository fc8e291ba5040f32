"""What a deformation lock is asked to be."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from specdef.lock.config import known_fields, selection

Optimizer = Literal["adadelta", "adam", "adamw", "rmsprop", "sgd"]
LearningRateSchedule = Literal["step", "linear", "cosine", "constant"]
RetainLoss = Literal["task", "kl", "task+kl"]
Teacher = Literal["auto", "cached", "online"]
Trained = Literal["all", "targets"]

DEFAULT_LEARNING_RATE: dict[str, float] = {
    "adadelta": 1.0, "adam": 1e-3, "adamw": 1e-4, "rmsprop": 1e-4, "sgd": 1e-2,
}  # fmt: skip
"""adadelta: papers/001, B.2. The others are the usual ones of fine-tuning, not the paper's."""

_EVALUATIONS = 20
"""Of a run whose `eval_every` is None."""

CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("deformation",),
    "optimizer": tuple(DEFAULT_LEARNING_RATE),
    "lr_schedule": ("step", "linear", "cosine", "constant"),
    "retain_loss": ("task", "kl", "task+kl"),
    "teacher": ("auto", "cached", "online"),
    "train": ("all", "targets"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeformationConfig:
    """Recipe of a deformation lock: W <- W - lr grad[alpha retain - (1 - alpha) mean of the top-k singular values].

    The defaults are those of papers/001 for vision (Appendix B.2); for text it takes `retain_weight=0.99, k=2,
    retain_loss="task+kl"`.

    Args:
        method: Always "deformation".
        retain_weight: alpha, in (0, 1]; 1 leaves the spectral term out.
        k: Singular values raised per matrix; no matrix may have fewer.
        retain_loss: What is retained: the task loss, KL(original || locked), or their sum.
        teacher: The original's outputs for KL: computed once and kept ("cached"), by a copy of the model in every step
            ("online"), or cached where they take little memory ("auto").
        optimizer: adadelta | adam | adamw | rmsprop | sgd (with momentum 0.9).
        learning_rate: None takes `DEFAULT_LEARNING_RATE`.
        weight_decay: As the optimiser takes it.
        lr_schedule: step multiplies by `gamma` after every epoch; linear and cosine go to 0; constant.
        gamma: Of the step schedule.
        epochs: Passes over the retain data, where `steps` is None.
        steps: Optimiser steps; wins over `epochs`.
        max_grad_norm: Gradients (of both terms together) are clipped to this norm; None does not clip.
        target_modules: Modules whose matrices are deformed: names or one regular expression, as in PEFT; None means all.
        layers: Indices of the blocks; None means all.
        embeddings: Deform embedding matrices too (and an output layer tied to one).
        train: Which parameters move: all, or the deformed matrices alone (a smaller key).
        target_sigma_max: Stop once the largest singular value of any deformed matrix has reached this.
        target_growth: Stop once some matrix's largest singular value has grown by this factor.
        max_utility_loss: Largest loss of utility (held-out accuracy, 0.02 is two points; for a callable loss its own
            units) a state may have to be kept; None keeps any.
        patience: Evaluations in a row below that floor after which the lock ends with the last state above it.
        eval_every: Steps between evaluations; None makes about 20 of them.
        seed: Of the order of the batches, of dropout and of the spectral start.

    Raises:
        ValueError: A field is out of range.
    """

    method: Literal["deformation"] = "deformation"
    retain_weight: float = 0.5
    k: int = 1
    retain_loss: RetainLoss = "task"
    teacher: Teacher = "auto"
    optimizer: Optimizer = "adadelta"
    learning_rate: float | None = None
    weight_decay: float = 0.0
    lr_schedule: LearningRateSchedule = "step"
    gamma: float = 0.7
    epochs: int = 10
    steps: int | None = None
    max_grad_norm: float | None = None
    target_modules: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | None = None
    embeddings: bool = False
    train: Trained = "all"
    target_sigma_max: float | None = None
    target_growth: float | None = None
    max_utility_loss: float | None = 0.02
    patience: int = 3
    eval_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}."
                )
        for name in ("target_modules", "layers"):
            object.__setattr__(self, name, selection(name, getattr(self, name)))
        if not 0 < self.retain_weight <= 1:  # NaN fails too
            raise ValueError(f"retain_weight (alpha) must be in (0, 1], got {self.retain_weight}.")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma}.")
        for name in ("k", "epochs", "patience", "steps", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("learning_rate", "max_grad_norm", "target_sigma_max"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        if self.target_growth is not None and not (
            math.isfinite(self.target_growth) and self.target_growth > 1
        ):
            raise ValueError(f"target_growth must be finite and above 1, got {self.target_growth}.")
        for name in ("weight_decay", "max_utility_loss"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:  # JSON knows no infinity
                raise ValueError(f"{name} must be finite and at least 0, got {value}.")

    @property
    def rate(self) -> float:
        """The learning rate, default filled in."""
        chosen = self.learning_rate
        return DEFAULT_LEARNING_RATE[self.optimizer] if chosen is None else chosen

    def interval(self, steps: int) -> int:
        """Return the steps between evaluations of a run of so many, default filled in."""
        return self.eval_every or max(1, math.ceil(steps / _EVALUATIONS))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, `learning_rate` filled in."""
        return {**asdict(self), "learning_rate": self.rate}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DeformationConfig:
        """Read back what `to_dict` wrote; unknown fields of newer versions are ignored."""
        return cls(**known_fields(cls, values))
