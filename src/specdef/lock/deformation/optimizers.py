"""Optimisers of a deformation by name, and their learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

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
    if config.lr_schedule == "step":
        return float(config.gamma ** (step // per_epoch))
    return falling(config.lr_schedule, step / steps)


def falling(schedule: Literal["constant", "linear", "cosine"], done: float) -> float:
    """Return what the learning rate is multiplied by after a share of the steps.

    Args:
        schedule: linear and cosine end at 0.
        done: Share of the steps that were taken.

    Returns:
        A factor in [0, 1].

    >>> [round(falling("cosine", done), 3) for done in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """
    match schedule:
        case "linear":
            return 1 - done
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        case "constant":
            return 1.0
