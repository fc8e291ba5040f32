"""What a step costs when only a part of a model trains."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def step_work(
    model: nn.Module, trained: Iterable[nn.Parameter] | None = None, *, inputs: bool = False
) -> int:
    """Estimate the multiplications of a step per token.

    Every matrix is multiplied by in the forward pass, once more for its own gradient if it trains, and once more for its
    input's if anything before it does. The order of the modules stands for the order they run in; embeddings are looked
    up; kernels of convolutions count as if all were applied equally often.

    Args:
        model: The model.
        trained: What trains; None is everything.
        inputs: Whether the model's input trains, too, so that gradients pass through all of it.

    Returns:
        Multiplications, in numbers of weights.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> step_work(model), step_work(model, model[1].parameters())
    (48, 28)
    """
    moving = {id(p) for p in (model.parameters() if trained is None else trained)}
    work, reached = 0, inputs
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not isinstance(module, nn.Embedding):
            work += sum(p.numel() * (1 + reached + (id(p) in moving)) for p in own if p.ndim > 1)
        reached = reached or any(id(p) in moving for p in own)
    return work


def relative_cost(model: nn.Module, trained: Iterable[nn.Parameter], full: int) -> float:
    """Return the work of a step over that of full training.

    Args:
        model: As it trains.
        trained: What trains.
        full: `step_work` of the model as it was given.

    Returns:
        The ratio; 1 where there is no work to compare with.
    """
    return step_work(model, trained) / full if full else 1.0
