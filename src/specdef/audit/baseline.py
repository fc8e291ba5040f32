"""What an audit measures before the first attack: losses, the constant guess, and whether the locked model still works."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from specdef.attacks.task import Task
from specdef.curvature.cross_entropy import IGNORE
from specdef.curvature.losses import MSELoss
from specdef.errors import SpecDefError
from specdef.lock.deformation.retain import measure_utility, task_loss, to_device

USELESS = 0.9
"""Below this share of the original's utility a locked model is said to have lost its own."""

USELESS_LOSS = 2.0
"""Above this many times the original's loss, where utility is a loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Both models before any attack.

    Args:
        original: Held-out loss of the unlocked model.
        locked: Of the locked one.
        chance: Of the constant guess that fits the training labels.
        utility_original: Utility on the retain data; None where there is none.
        utility_locked: The same of the locked model.
        useless: The locked model does not do its own work any more.
        metrics_original: The task's own numbers, of the unlocked model; empty where it has none.
        metrics_locked: The same of the locked model.
    """

    original: float
    locked: float
    chance: float
    utility_original: float | None
    utility_locked: float | None
    useless: bool
    metrics_original: dict[str, float] = field(default_factory=dict)
    metrics_locked: dict[str, float] = field(default_factory=dict)

    @property
    def start(self) -> float:
        """Loss that gains count from.

        A model sure of wrong answers is above the constant guess; coming down to it is forgetting, not learning.
        """
        return min(self.original, self.chance)


def measure_baseline(locked: nn.Module, original: nn.Module, task: Task) -> Baseline:
    """Measure both models on held-out and retain data.

    Args:
        locked: The locked model.
        original: The unlocked one.
        task: The task.

    Returns:
        The baseline.

    Raises:
        SpecDefError: The unlocked model's loss is not finite.
    """
    before = measure_utility(original, task.heldout, task.loss).loss
    if not math.isfinite(before):
        raise SpecDefError(f"the held-out loss of the unlocked model is {before}", hint="The model or the data is damaged.")  # fmt: skip
    after = measure_utility(locked, task.heldout, task.loss).loss
    chance = constant_guess(original, task)
    useless = not math.isfinite(after) or before < chance < after
    of_original = of_locked = None
    if len(task.retain):
        kept, left = measure_utility(original, task.retain), measure_utility(locked, task.retain)
        of_original, of_locked = kept.value, left.value
        if kept.metric == "negative loss":
            useless = useless or not left.loss <= USELESS_LOSS * kept.loss
        else:
            useless = useless or not left.value >= USELESS * kept.value
    return Baseline(
        original=before, locked=after, chance=chance, utility_original=of_original, utility_locked=of_locked,
        useless=useless, metrics_original=task.metrics(original) if task.metrics else {},
        metrics_locked=task.metrics(locked) if task.metrics else {},
    )  # fmt: skip


def constant_guess(model: nn.Module, task: Task) -> float:
    """Return the held-out loss of the best answer that does not look at its input.

    Args:
        model: Says how many classes there are.
        task: The task.

    Returns:
        Nats under the frequencies of the training labels, each counted once more than it occurs; for a squared error the
        variance around the training mean.
    """
    first = to_device(task.train[0], model)
    kind = task_loss(model, first, task.loss)
    if isinstance(kind, MSELoss):
        mean = torch.cat([kind.targets(b).flatten(1).double() for b in task.train]).mean(0)
        rows = torch.cat([kind.targets(b).flatten(1).double() for b in task.heldout])
        return float((rows - mean).square().mean())
    with torch.no_grad():
        classes = kind.outputs(model, first).shape[-1]
    seen = torch.cat([kind.targets(batch).flatten() for batch in task.train])
    asked = torch.cat([kind.targets(batch).flatten() for batch in task.heldout])
    counts = torch.bincount(seen[seen != IGNORE].cpu(), minlength=classes).double() + 1
    return float(-(counts / counts.sum()).log()[asked[asked != IGNORE].cpu()].mean())
