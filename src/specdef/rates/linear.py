"""Optimisers with constant coefficients: the recurrence on one eigenvalue, the stability limit, torch's own update.

On a quadratic with eigenvalue l, a method with constant coefficients multiplies a small state by the same matrix at
every step, which depends on h = lr * l alone; it is stable while h stays below a constant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, final

import torch
from torch import Tensor


class Optimizer(ABC):
    """What every optimiser can say of itself. Learning rates are not part of it: they are what is asked for."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def stability_limit(self) -> float:
        """c: with the preconditioner fixed, stable for learning_rate * lambda_max < c."""

    @abstractmethod
    def build(self, params: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return torch's optimiser with these settings: what the prediction is about."""

    def to_dict(self) -> dict[str, Any]:
        """Return name and settings as JSON values."""
        return {"name": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


class LinearOptimizer(Optimizer):
    """A method with constant coefficients: its run on a quadratic is known in closed form.

    The state on one eigenvalue l is (psi, m, 1): the displacement is -lr psi times the gradient's coordinate, m the
    momentum buffer in units of that coordinate, and 1 - h psi the share of the gradient that is left.
    """

    @abstractmethod
    def transition(self, h: Tensor) -> Tensor:
        """Return the matrix of one step.

        Args:
            h: `[...]`, learning rate times eigenvalue.

        Returns:
            `[..., 3, 3]`, acting on (psi, m, 1), which starts at (0, 0, 1).
        """


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GradientDescent(LinearOptimizer):
    """theta <- theta - lr g. Stable for lr < 2 / lambda_max.

    >>> GradientDescent().stability_limit
    2.0
    """

    name: ClassVar[str] = "gd"

    @property
    def stability_limit(self) -> float:
        """2."""
        return 2.0

    def transition(self, h: Tensor) -> Tensor:
        """Return the step psi <- psi + (1 - h psi); see `LinearOptimizer`."""
        return _matrix(h, psi=(1 - h, 0, 1), momentum=(0, 0, 0))

    def build(self, params: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return `torch.optim.SGD`."""
        return torch.optim.SGD(params, lr=learning_rate)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HeavyBall(LinearOptimizer):
    """m <- beta m + g, theta <- theta - lr m, as `torch.optim.SGD(momentum=beta)`. Stable for lr < 2 (1 + beta) / lambda_max.

    Args:
        beta: Momentum, in [0, 1).

    Raises:
        ValueError: beta is out of range.
    """

    name: ClassVar[str] = "heavy_ball"
    beta: float = 0.9

    def __post_init__(self) -> None:
        check_fractions(beta=self.beta)

    @property
    def stability_limit(self) -> float:
        """2 (1 + beta)."""
        return 2 * (1 + self.beta)

    def transition(self, h: Tensor) -> Tensor:
        """Return the step m <- beta m + 1 - h psi, psi <- psi + m; see `LinearOptimizer`."""
        return _matrix(h, psi=(1 - h, self.beta, 1), momentum=(-h, self.beta, 1))

    def build(self, params: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return `torch.optim.SGD` with momentum."""
        return torch.optim.SGD(params, lr=learning_rate, momentum=self.beta)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Nesterov(LinearOptimizer):
    """m <- beta m + g, theta <- theta - lr (g + beta m), as `torch.optim.SGD(nesterov=True)`.

    Stable for lr < (2 + 2 beta) / ((1 + 2 beta) lambda_max).

    Args:
        beta: Momentum, in (0, 1).

    Raises:
        ValueError: beta is out of range.
    """

    name: ClassVar[str] = "nesterov"
    beta: float = 0.9

    def __post_init__(self) -> None:
        check_fractions(beta=self.beta)
        if self.beta == 0:
            raise ValueError("beta must be positive for Nesterov; use GradientDescent().")

    @property
    def stability_limit(self) -> float:
        """(2 + 2 beta) / (1 + 2 beta)."""
        return (2 + 2 * self.beta) / (1 + 2 * self.beta)

    def transition(self, h: Tensor) -> Tensor:
        """Return the step m <- beta m + 1 - h psi, psi <- psi + 1 - h psi + beta m; see `LinearOptimizer`."""
        b = self.beta
        return _matrix(h, psi=(1 - (1 + b) * h, b * b, 1 + b), momentum=(-h, b, 1))

    def build(self, params: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return `torch.optim.SGD` with Nesterov momentum."""
        return torch.optim.SGD(params, lr=learning_rate, momentum=self.beta, nesterov=True)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SGD(LinearOptimizer):
    """Gradient descent on noisy gradients g + xi, E xi = 0, E |xi|^2 = noise, the same at every step.

    The noise is taken to lie along the eigenvectors as the gradient does (its spectral measure is the gradient's):
    nothing else is known of it here.

    Args:
        noise: Trace of the covariance of the batch gradient, in the gradient's units squared; 0 is `GradientDescent`.

    Raises:
        ValueError: noise is negative.
    """

    name: ClassVar[str] = "sgd"
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not self.noise >= 0:
            raise ValueError(f"noise must not be negative, got {self.noise}.")

    @property
    def stability_limit(self) -> float:
        """2: below it the mean converges; the noise leaves a floor."""
        return 2.0

    def transition(self, h: Tensor) -> Tensor:
        """Return the step of the mean, as for `GradientDescent`."""
        return GradientDescent().transition(h)

    def build(self, params: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return `torch.optim.SGD`."""
        return torch.optim.SGD(params, lr=learning_rate)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KFAC(LinearOptimizer):
    """theta <- theta - lr P^-1 g with P = F + damping, F in Kronecker blocks by layer, held at the start (`KroneckerFactors`).

    Stable for lr < 2 / lambda_max(P^-1 H).

    Args:
        damping: Added to the eigenvalues of every block, in the units of the loss's curvature.

    Raises:
        ValueError: damping is not positive.
    """

    name: ClassVar[str] = "kfac"
    damping: float = 1e-3

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping must be positive, got {self.damping}.")

    @property
    def stability_limit(self) -> float:
        """2, for P^-1 H."""
        return 2.0

    def transition(self, h: Tensor) -> Tensor:
        """Return the step of gradient descent, in the coordinates of P^(1/2) theta."""
        return GradientDescent().transition(h)

    def build(self, params: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Return `torch.optim.SGD`, to be given gradients already multiplied by P^-1."""
        return torch.optim.SGD(params, lr=learning_rate)


def _matrix(
    h: Tensor,
    *,
    psi: tuple[Tensor | float, Tensor | float, Tensor | float],
    momentum: tuple[Tensor | float, Tensor | float, Tensor | float],
) -> Tensor:
    """Stack two rows and the constant row (0, 0, 1) to `[..., 3, 3]`."""
    rows = (psi, momentum, (0.0, 0.0, 1.0))
    like = torch.zeros_like(h)
    return torch.stack([torch.stack([like + entry for entry in row], -1) for row in rows], -2)


def check_fractions(**values: float) -> None:
    """Refuse values outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}.")


def check_not_negative(**values: float) -> None:
    """Refuse negative values and NaN."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}.")
