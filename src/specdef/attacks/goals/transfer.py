"""Unauthorised task transfer: train a classifier on another data set, with as many classes or not."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from specdef.attacks.goals.measure import accuracy, labels_of
from specdef.attacks.partial.head import replace_head
from specdef.attacks.task import Task
from specdef.curvature.losses import Batch, ClassificationLoss
from specdef.lock.deformation.retain import evaluating, to_device


def transfer(
    model: nn.Module,
    train: Sequence[Batch],
    heldout: Sequence[Batch],
    *,
    classes: int | None = None,
    retain: Sequence[Batch] = (),
    seed: int = 0,
) -> tuple[nn.Module, Task]:
    """Build the transfer of a classifier to another data set.

    Args:
        model: The classifier; not changed. Call it alike, with the same seed, for locked and unlocked model.
        train: Labelled batches of the new data set.
        heldout: More of them.
        classes: Number of its classes; None takes the largest label + 1.
        retain: Batches of the model's own task; measured only while it keeps its output layer.
        seed: Of the fresh output layer.

    Returns:
        (model to be attacked, goal). The model is the one given where the numbers of classes agree, otherwise a copy with
        a fresh output layer. Metrics: `new_accuracy` and, with `retain`, `kept_accuracy`.
    """
    wanted = classes or 1 + max(int(labels_of(batch).max()) for batch in (*train, *heldout))
    with evaluating(model), torch.no_grad():
        present = ClassificationLoss().outputs(model, to_device(train[0], model)).shape[-1]
    if present != wanted:
        model = copy.deepcopy(model)
        replace_head(model, torch.Generator().manual_seed(seed), wanted)
        retain = ()

    def metrics(attacked: nn.Module) -> dict[str, float]:
        parts = {"new_accuracy": heldout, "kept_accuracy": retain}
        return {name: accuracy(attacked, batches) for name, batches in parts.items() if len(batches)}  # fmt: skip

    task = Task(name="transfer", train=train, heldout=heldout, retain=retain, metrics=metrics)
    return model, task
