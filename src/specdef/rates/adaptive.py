"""Optimisers that divide each coordinate by a running size of its gradient: simulated, since no spectrum tells their run.

With the preconditioner P held fixed they have a stability limit like the others (Cohen et al. 2022, arXiv 2207.14484); a
run from a fresh state is stopped by its first steps, long before P has settled.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from specdef.rates.linear import Optimizer, check_fractions, check_not_negative


class AdaptiveOptimizer(Optimizer):
    """A method with an elementwise preconditioner."""

    @abstractmethod
    def preconditioner(self, gradient: Tensor) -> Tensor:
        """Return the diagonal of P `[n]` after one step with a gradient `[n]` from a fresh state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _AdamSettings(AdaptiveOptimizer):
    """What Adam and AdamW share: settings, limit and torch's update."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_fractions(beta1=self.beta1, beta2=self.beta2)
        check_not_negative(eps=self.eps, weight_decay=self.weight_decay)

    @property
    def stability_limit(self) -> float:
        """(2 + 2 beta1) / (1 - beta1), for P^-1 H."""
        return (2 + 2 * self.beta1) / (1 - self.beta1)

    def preconditioner(self, gradient: Tensor) -> Tensor:
        """Return |g| + eps: the bias correction makes the second moment g^2."""
        return gradient.abs() + self.eps

    def build(self, params: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return `torch.optim.AdamW`."""
        return torch.optim.AdamW(
            params,
            lr=learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Adam(_AdamSettings):
    """Adam. With P = diag(sqrt(v) + eps) fixed, stable for lr < (2 + 2 beta1) / (1 - beta1) / lambda_max(P^-1 H).

    Args:
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, as in AdamW.

    Raises:
        ValueError: A setting is out of range.

    >>> round(Adam().stability_limit, 9)
    38.0
    """

    name: ClassVar[str] = "adam"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(_AdamSettings):
    """`torch.optim.AdamW` with its default weight decay; see `Adam`.

    Args:
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.

    Raises:
        ValueError: A setting is out of range.
    """

    name: ClassVar[str] = "adamw"
    weight_decay: float = 0.01


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RMSProp(AdaptiveOptimizer):
    """`torch.optim.RMSprop`. With P = diag(sqrt(v) + eps) fixed, stable for lr < 2 / lambda_max(P^-1 H).

    Args:
        alpha: Decay of the second moment.
        eps: Added to the root of the second moment.

    Raises:
        ValueError: A setting is out of range.
    """

    name: ClassVar[str] = "rmsprop"
    alpha: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_fractions(alpha=self.alpha)
        check_not_negative(eps=self.eps)

    @property
    def stability_limit(self) -> float:
        """2, for P^-1 H."""
        return 2.0

    def preconditioner(self, gradient: Tensor) -> Tensor:
        """Return sqrt(1 - alpha) |g| + eps."""
        return gradient.abs() * math.sqrt(1 - self.alpha) + self.eps

    def build(self, params: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return `torch.optim.RMSprop`."""
        return torch.optim.RMSprop(params, lr=learning_rate, alpha=self.alpha, eps=self.eps)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AdaDelta(AdaptiveOptimizer):
    """`torch.optim.Adadelta`. Its steps do not depend on the size of the gradient and grow from sqrt(eps) at the start.

    Args:
        rho: Decay of both running averages.
        eps: Sets the size of the first steps, lr sqrt(eps / (1 - rho)) per coordinate.

    Raises:
        ValueError: A setting is out of range.
    """

    name: ClassVar[str] = "adadelta"
    rho: float = 0.9
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fractions(rho=self.rho)
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}.")

    @property
    def stability_limit(self) -> float:
        """2, for P^-1 H."""
        return 2.0

    def preconditioner(self, gradient: Tensor) -> Tensor:
        """Return sqrt((1 - rho) g^2 + eps) / sqrt(eps)."""
        floor = math.sqrt(self.eps)
        return (
            torch.hypot(math.sqrt(1 - self.rho) * gradient, torch.full_like(gradient, floor))
            / floor
        )

    def build(self, params: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return `torch.optim.Adadelta`."""
        return torch.optim.Adadelta(params, lr=learning_rate, rho=self.rho, eps=self.eps)
