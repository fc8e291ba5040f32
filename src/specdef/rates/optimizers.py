"""The optimisers a prediction knows, by name."""

from __future__ import annotations

from specdef.rates.adaptive import AdaDelta, Adam, AdamW, RMSProp
from specdef.rates.linear import (
    KFAC,
    SGD,
    GradientDescent,
    HeavyBall,
    Nesterov,
    Optimizer,
)

OPTIMIZERS: dict[str, Optimizer] = {
    known.name: known
    for known in (
        *(GradientDescent(), SGD(), HeavyBall(), Nesterov(), KFAC()),
        *(Adam(), AdamW(), RMSProp(), AdaDelta()),
    )
}
"""Name to optimiser with its default settings."""


def resolve(optimizer: Optimizer | str) -> Optimizer:
    """Return an optimiser by name with its default settings; an instance is returned as it is.

    Args:
        optimizer: An instance, or a name of `OPTIMIZERS`.

    Returns:
        The optimiser.

    Raises:
        ValueError: No optimiser has that name.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer must be one of {', '.join(OPTIMIZERS)} or an Optimizer, got {optimizer!r}."
        )
    return OPTIMIZERS[optimizer]
