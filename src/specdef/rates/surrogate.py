"""A low-rank quadratic model in full coordinates, on which any optimiser can be run without the network.

Adaptive methods treat every coordinate differently, so no spectrum tells their run. Lanczos on P^-1/2 H P^-1/2 from P^-1/2 g
gives H ~ R^T T R with R = Q P^1/2 `[m, n]`: exact on the first m - 1 products with steps P^-1 g. A step on it costs
4 m n operations and no gradient of the network; the update is torch's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from specdef.curvature.lanczos import LanczosRun, lanczos
from specdef.curvature.linear import ScaledOperator, SymmetricOperator
from specdef.rates.linear import Optimizer


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """g^T d + (1/2) d^T R^T T R d, the change of the loss at a displacement d.

    Args:
        gradient: g `[n]`.
        rows: R `[m, n]`.
        tridiagonal: T `[m, m]`.
        run: The Lanczos run behind it.
    """

    gradient: Tensor
    rows: Tensor
    tridiagonal: Tensor
    run: LanczosRun

    def change(self, displacement: Tensor) -> float:
        """Return the change of the loss at a displacement `[n]`."""
        inner = self.rows @ displacement
        return float(self.gradient @ displacement) + float(inner @ (self.tridiagonal @ inner)) / 2

    def gradient_at(self, displacement: Tensor) -> Tensor:
        """Return the gradient at a displacement `[n]`."""
        return torch.addmv(
            self.gradient, self.rows.T, self.tridiagonal @ (self.rows @ displacement)
        )


def surrogate_of(
    operator: SymmetricOperator, gradient: Tensor, preconditioner: Tensor, num_steps: int
) -> Surrogate:
    """Build the model that a preconditioned method sees first.

    Cost: num_steps products; num_steps + 4 vectors of memory.

    Args:
        operator: H.
        gradient: g `[n]`.
        preconditioner: The diagonal of P `[n]`, positive.
        num_steps: Rank m of the model.

    Returns:
        The model.
    """
    g = gradient.to(operator.device, operator.dtype)
    scale = preconditioner.to(g).rsqrt()
    run = lanczos(ScaledOperator(operator, scale), scale * g, min(num_steps, operator.shape[0]))
    assert run.basis is not None
    T = run.diagonal.diag() + run.off_diagonal.diag(1) + run.off_diagonal.diag(-1)
    return Surrogate(gradient=g, rows=run.basis.div_(scale), tridiagonal=T.to(g), run=run)


def simulate(
    surrogate: Surrogate,
    optimizer: Optimizer,
    learning_rate: float,
    num_steps: int,
    *,
    weights: Tensor | None = None,
    target: float | None = None,
) -> tuple[list[float], Tensor]:
    """Run an optimiser on the model.

    Args:
        surrogate: The model.
        optimizer: Any; its own torch implementation is stepped.
        learning_rate: Constant rate.
        num_steps: Steps to make.
        weights: `[n]`, where the run starts, which only weight decay looks at; zero by default.
        target: Stop when the loss has fallen by this much.

    Returns:
        The changes of the loss after 1, 2, … steps (shorter where it stopped: target met, or no longer finite), and the
        last displacement.
    """
    start = torch.zeros_like(surrogate.gradient) if weights is None else weights.to(surrogate.gradient)  # fmt: skip
    theta = start.clone()
    method = optimizer.build([theta], learning_rate)
    displacement, changes = torch.zeros_like(theta), []
    for _ in range(num_steps):
        theta.grad = surrogate.gradient_at(displacement)
        method.step()
        torch.sub(theta, start, out=displacement)
        changes.append(surrogate.change(displacement))
        if not math.isfinite(changes[-1]) or (target is not None and changes[-1] <= -target):
            break
    return changes, displacement


def first_step(optimizer: Optimizer, gradient: Tensor) -> Tensor:
    """Return the first step at learning rate 1, without weight decay: for Adam, minus the sign of the gradient.

    Args:
        optimizer: Any.
        gradient: g `[n]`.

    Returns:
        The direction `[n]`; every optimiser here multiplies it by its rate.
    """
    theta = torch.zeros_like(gradient)
    method = optimizer.build([theta], 1.0)
    theta.grad = gradient
    method.step()
    return theta.detach()
