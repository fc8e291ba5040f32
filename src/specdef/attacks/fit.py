"""A plain training loop, for models that are made before an attack is measured: students, unlearned models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from specdef.curvature.losses import Batch, Loss
from specdef.errors import SpecDefError
from specdef.lock.deformation.data import batches_from
from specdef.lock.deformation.retain import task_loss, task_mean, to_device


def fit(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> float:
    """Train every parameter with AdamW, at a rate that falls linearly to 0.

    Args:
        model: Trained in place; in evaluation mode afterwards.
        batches: One per step, in another order in every epoch.
        loss: Model and batch, as they are, to a scalar.
        steps: Number of steps.
        learning_rate: Of the first step.
        weight_decay: Of AdamW.
        seed: Of the order.

    Returns:
        The loss of the last batch before its step; nan for no step.

    Raises:
        SpecDefError: A loss is not finite.
    """
    parameters = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    value = torch.tensor(torch.nan)
    model.train()
    for step, (_, batch) in enumerate(batches_from(batches, seed, 0, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, batch)
        if not bool(value.isfinite()):
            raise SpecDefError(
                f"the loss of step {step + 1} is {float(value.detach())} at learning rate {learning_rate:g}",
                hint="Use a smaller learning rate.",
            )
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return float(value.detach())


def batch_loss(model: nn.Module, batch: Batch, loss: Loss | None = None) -> Tensor:
    """Return the mean task loss of a batch.

    Args:
        model: The model, in the mode it is in.
        batch: Moved to its device.
        loss: None takes what suits model and labels.

    Returns:
        A scalar with its graph; NaN where no term counts.
    """
    own = to_device(batch, model)
    kind = task_loss(model, own, loss)
    return task_mean(kind, kind.outputs(model, own), own)
