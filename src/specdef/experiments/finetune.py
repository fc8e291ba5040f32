"""Full fine-tuning with AdamW at rates named beforehand: the plainest attack, for the demo and for benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from specdef.attacks.full import FullTraining
from specdef.attacks.run import Pruned, Run
from specdef.attacks.task import Budget, Setting, Task
from specdef.curvature.losses import Batch
from specdef.lock.deformation.retain import measure_utility

LOST = 2.0
"""A run is given up above this many times its starting loss."""


def sweep(
    model: nn.Module,
    train: Sequence[Batch],
    held_out: Sequence[Batch],
    rates: Sequence[float],
    *,
    progress: Callable[[Run], None] | None = None,
) -> list[Run]:
    """Fine-tune a fresh copy of a model at every learning rate, one step per batch.

    Args:
        model: The model; not changed.
        train: Batches to learn from.
        held_out: Batches the loss is measured on, before the first step and after every second.
        rates: Learning rates.
        progress: Called after each run.

    Returns:
        The runs, in the order of the rates.
    """
    task = Task(name="fine-tuning", train=train, heldout=held_out)
    budget = Budget(steps=len(train), evaluations=-(-len(train) // 2))
    start = measure_utility(model, held_out).loss

    def watch(_: int, loss: float) -> None:
        if loss > LOST * start:
            raise Pruned

    runs: list[Run] = []
    for rate in rates:
        runs.append(FullTraining()(model, task, Setting(learning_rate=rate), budget, watch=watch))
        if progress:
            progress(runs[-1])
    return runs
