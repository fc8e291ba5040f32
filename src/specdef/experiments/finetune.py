"""Fine-tune a model for a few steps and watch its loss on held-out text: the plainest attack there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One fine-tuning run.

    Args:
        learning_rate: AdamW's rate.
        steps: Step numbers at which the loss was measured, 0 first.
        losses: Held-out loss at these steps, nats per token; inf where it was no longer finite.
        diverged: The loss left twice its start, or became infinite, and the run was stopped.
    """

    learning_rate: float
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    diverged: bool

    @property
    def best(self) -> float:
        """Lowest loss seen."""
        return min(self.losses)


def finetune(
    model: nn.Module,
    train: Sequence[Batch],
    held_out: Sequence[Batch],
    learning_rate: float,
    *,
    measure_every: int = 2,
) -> Run:
    """Train all parameters with AdamW (torch's defaults, no weight decay), one step per batch.

    Args:
        model: Trained in place.
        train: One batch per step, with labels.
        held_out: Batches the loss is measured on.
        learning_rate: Constant rate.
        measure_every: Steps between measurements; the last step is always measured.

    Returns:
        The loss curve. A run that diverges stops early: that is a result, not an error.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True
    )
    losses = [held_out_loss(model, held_out)]
    steps = [0]
    diverged = False
    for step, batch in enumerate(train, start=1):
        loss = model(**batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        lost = not float(loss.detach()) <= 2 * losses[0]
        if lost or step % measure_every == 0 or step == len(train):
            losses.append(held_out_loss(model, held_out))
            steps.append(step)
            if not losses[-1] <= 2 * losses[0]:
                diverged = True
                break
    return Run(
        learning_rate=learning_rate, steps=tuple(steps), losses=tuple(losses), diverged=diverged
    )


def sweep(
    load: Callable[[], nn.Module],
    train: Sequence[Batch],
    held_out: Sequence[Batch],
    rates: Sequence[float],
    *,
    progress: Callable[[Run], None] | None = None,
) -> list[Run]:
    """Fine-tune a fresh copy at every learning rate.

    Args:
        load: Gives the model to attack; called once, its weights are put back between runs.
        train: One batch per step.
        held_out: Batches the loss is measured on.
        rates: Learning rates.
        progress: Called after each run.

    Returns:
        The runs, in the order of the rates.
    """
    model = load()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runs = []
    for rate in rates:
        model.load_state_dict(start)
        runs.append(finetune(model, train, held_out, rate))
        if progress:
            progress(runs[-1])
    return runs


def held_out_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean loss over batches, nats per token; inf where it is not finite."""
    with torch.no_grad():
        total = sum(float(model(**batch).loss) for batch in batches) / len(batches)
    return total if math.isfinite(total) else math.inf
