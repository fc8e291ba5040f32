"""Optimisers of a deformation by name, and their learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from specdef.lock.deformation.config import DeformationConfig


def make_optimizer(
    parameters: Sequence[nn.Parameter], config: DeformationConfig
) -> torch.optim.Optimizer:
    """Build torch's optimiser of a recipe; Adam and SGD in one fused pass over memory.

    Args:
        parameters: What moves.
        config: Its `optimizer`, `learning_rate` and `weight_decay` are used.

    Returns:
        The optimiser, at the recipe's rate.
    """
    options: dict[str, Any] = {"lr": config.rate, "weight_decay": config.weight_decay}
    match config.optimizer:
        case "adadelta":
            return torch.optim.Adadelta(parameters, **options)
        case "adam":
            return torch.optim.Adam(parameters, fused=True, **options)
        case "adamw":
            return torch.optim.AdamW(parameters, fused=True, **options)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, **options)
        case "sgd":
            return torch.optim.SGD(parameters, momentum=0.9, fused=True, **options)


def rate_factor(config: DeformationConfig, step: int, steps: int, per_epoch: int) -> float:
    """Return what the learning rate is multiplied by in a step.

    Args:
        config: Its schedule and `gamma` are used.
        step: 0 for the first.
        steps: Steps in all.
        per_epoch: Steps of an epoch.

    Returns:
        A factor in [0, 1].

    >>> [rate_factor(DeformationConfig(), step, 6, 2) for step in (0, 1, 2)]
    [1.0, 1.0, 0.7]
    """
    done = step / steps
    match config.lr_schedule:
        case "step":
            return float(config.gamma ** (step // per_epoch))
        case "linear":
            return 1 - done
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        case "constant":
            return 1.0
