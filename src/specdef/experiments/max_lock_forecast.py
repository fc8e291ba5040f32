"""The slowdown a row of the table is forecast to have, from gradients and curvature of the unlocked model alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from specdef.attacks.full import FullTraining
from specdef.attacks.partial.freeze import TrainOnly
from specdef.attacks.partial.lora import LoRA
from specdef.attacks.registry import find
from specdef.attacks.task import Task
from specdef.experiments.mixed_precision import MixedPrecision
from specdef.lock.forecast import Step, expected_slowdowns
from specdef.weights.edit import ScaleEdit

BATCHES = 1
"""Training batches a forecast looks at."""

STEPS: Mapping[str, Step] = {
    "adamw": "sign", "lion": "sign", "muon": "sign", "adafactor": "sign", "momentum": "gradient", "sgd": "gradient",
}  # fmt: skip
"""How an optimiser's first step lies; K-FAC's follows neither."""


def predictions(
    model: nn.Module,
    task: Task,
    scalings: Mapping[str, Iterable[ScaleEdit]],
    attacks: Sequence[str],
) -> dict[str, float]:
    """Forecast what a lock slows attacks by.

    A low-rank update counts as an update of the matrices it stands beside.

    Args:
        model: The unlocked model.
        task: Its first training batches are used.
        scalings: The lock's edits by tensor.
        attacks: Names of attacks.

    Returns:
        Attack to progress per step at the best rate, unlocked over locked; attacks that edit the model first, train
        something new, or step along neither gradients nor their signs are left out.
    """
    wanted = {name: part for name in attacks if (part := _part(model, name)) is not None}
    if not wanted:
        return {}
    loss = task.loss.inner if isinstance(task.loss, MixedPrecision) else task.loss
    found: dict[str, float] = {}
    for step in dict.fromkeys(kind for _, kind in wanted.values()):
        parts = {name: members for name, (members, kind) in wanted.items() if kind == step}
        expected = expected_slowdowns(model, task.train[:BATCHES], scalings, parts=parts, steps=(step,), loss=loss)  # fmt: skip
        found |= {e.part: e.slowdown for e in expected}
    return found


def _part(model: nn.Module, name: str) -> tuple[list[str], Step] | None:
    """Return the parameters an attack trains or adapts, and how it steps; None where no forecast is made."""
    (attack,) = find([name])
    if attack.applies(model) or attack.optimizers[0] not in STEPS:
        return None
    step = STEPS[attack.optimizers[0]]
    if isinstance(attack, FullTraining):
        return [n for n, p in model.named_parameters() if p.is_floating_point()], step
    if isinstance(attack, TrainOnly):
        return list(attack.trained(model)), step
    if isinstance(attack, LoRA):
        return [f"{path}.weight" for path in attack.adapted(model)], step
    return None
