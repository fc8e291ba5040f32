"""The paper's own training of a classifier, before it is locked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from specdef.attacks.fit import batch_loss
from specdef.curvature.losses import Batch
from specdef.experiments.record import Progress
from specdef.lock.deformation.data import batches_from
from specdef.lock.deformation.retain import measure_utility
from specdef.models.mnist_resnet import GAMMA, LEARNING_RATE


def train(
    model: nn.Module, batches: Sequence[Batch], test: Sequence[Batch], epochs: int, seed: int, say: Progress
) -> dict[str, Any]:  # fmt: skip
    """Train a classifier as the paper trains its own: AdaDelta with learning rate 1, times 0.7 after every epoch.

    Args:
        model: Trained in place.
        batches: To learn from.
        test: To measure accuracy on.
        epochs: Passes.
        seed: Of the order of the batches.
        say: Told of every epoch.

    Returns:
        Facts: accuracy and seconds.
    """
    began = time.perf_counter()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=LEARNING_RATE)
    model.train()
    for step, (_, batch) in enumerate(batches_from(batches, seed, 0, epochs * len(batches))):
        epoch, first = divmod(step, len(batches))
        if not first:
            say(f"epoch {epoch + 1} of {epochs} on the net's own task")
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * GAMMA**epoch
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(batch_loss(model, batch))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    accuracy = measure_utility(model, test).value
    return {"accuracy": accuracy, "seconds": round(time.perf_counter() - began, 2)}
