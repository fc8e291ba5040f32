"""What a deformation says while it runs and when it is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from specdef.lock.deformation.retain import Utility

Stopped = Literal["finished", "target", "utility", "diverged"]
"""Why it ended: all steps taken; the wanted singular value reached; utility below the floor; NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The trade-off at one evaluation.

    Args:
        step: Steps taken.
        epoch: Passes over the retain data, a fraction.
        learning_rate: Of the next step.
        train_loss: Mean retain loss of the steps since the last snapshot; None at the start.
        retain_loss: Held-out task loss.
        utility: Held-out utility.
        sigma_max: Largest singular value of any deformed matrix.
        growth: Largest ratio of a matrix's largest singular value to what it was at the start.
        median_growth: Median of these ratios.
        seconds: Since the start, training before a resume included.
    """

    step: int
    epoch: float
    learning_rate: float
    train_loss: float | None
    retain_loss: float
    utility: float
    sigma_max: float
    growth: float
    median_growth: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a deformation is; given to the caller after every step.

    Args:
        step: Steps taken.
        steps: Steps in all.
        seconds: Since the start.
        seconds_left: At the pace so far, where nothing ends it sooner; None before the first step.
        train_loss: Retain loss of the last step; None before it.
        sigma_max: Largest singular value of any deformed matrix.
        snapshot: Where the model was just evaluated.
    """

    step: int
    steps: int
    seconds: float
    seconds_left: float | None
    train_loss: float | None
    sigma_max: float
    snapshot: Snapshot | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeformationResult:
    """What a deformation did.

    Args:
        sigma_before: Largest singular value of every deformed matrix (largest of a stack), by name in `named_parameters`.
        sigma_after: The same of the state that was kept.
        utility_before: On held-out data, of the original.
        utility_after: Of the state that was kept.
        history: One snapshot per evaluation, the start first.
        steps: Steps taken.
        kept_step: The step whose state was kept.
        stopped: Why it ended.
        reason: The same as a sentence.
        seconds: Wall time of the training, evaluations included.
        step_seconds: Mean seconds per step, without evaluations.
        spectral_seconds: The part of it that the spectral term took.
    """

    sigma_before: dict[str, float]
    sigma_after: dict[str, float]
    utility_before: Utility
    utility_after: Utility
    history: tuple[Snapshot, ...]
    steps: int
    kept_step: int
    stopped: Stopped
    reason: str
    seconds: float
    step_seconds: float
    spectral_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)
