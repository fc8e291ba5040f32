"""Models whose sensitive subspace, curvature coupling and path are known in closed form, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import specdef
from planted import gaussian, planted

DOUBLE = torch.float64


@dataclass(frozen=True)
class Toy:
    """A linear model with its aligned and task batches, and what is true of it."""

    model: nn.Module
    aligned: list[Any]
    task: list[Any]
    F: Tensor
    H: Tensor
    g: Tensor
    U: Tensor
    values: Tensor

    def diagnose(self, learning_rate: float, steps: int, **options: Any) -> specdef.FragilityReport:
        return specdef.fragility(
            self.model, self.aligned, options.pop("task", self.task), learning_rate=learning_rate, steps=steps,
            **({"krylov_steps": self.model.weight.numel()} | options),
        )  # fmt: skip

    def path(self, learning_rate: float, steps: int) -> Tensor:
        """Gradient descent on the quadratic, step by step: displacements `[steps, n]`."""
        d, found = torch.zeros_like(self.g), []
        for _ in range(steps):
            d = d - learning_rate * (self.g + self.H @ d)
            found.append(d)
        return torch.stack(found)

    def alignment(self, d: Tensor) -> Tensor:
        return (d @ self.U.T) ** 2 @ self.values / 2


def linear(weight: Tensor) -> nn.Linear:
    net = nn.Linear(len(weight), 1, bias=False, dtype=DOUBLE)
    with torch.no_grad():
        net.weight.copy_(weight[None])
    return net


def rows_of(matrix: Tensor) -> Tensor:
    """Rows X `[n, n]` with 2 / n X^T X = matrix: the data whose squared error has this Hessian."""
    values, vectors = torch.linalg.eigh(matrix)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root * (len(matrix) / 2) ** 0.5


def regression(
    n: int = 20, *, overlap: float = 0.0, scale: float = 1.0, rank: int = 3, seed: int = 0
) -> Toy:
    """Plant a regression: F of a given rank, H with every direction coupled, g with a given overlap with M."""
    U = torch.linalg.qr(gaussian(n * n, seed).view(n, n))[0].T[:rank].contiguous()
    values = torch.tensor([5.0, 3.0, 2.0, 1.5, 1.2, 1.1][:rank], dtype=DOUBLE)
    F = U.T @ (values[:, None] * U)
    H = planted(torch.linspace(0.2, 1.0, n, dtype=DOUBLE), seed + 1)
    g = gaussian(n, seed + 2)
    inside = U.T @ (U @ g)
    outside = (g - inside) / (g - inside).norm()
    g = scale * (overlap * inside / inside.norm() + (1 - overlap**2) ** 0.5 * outside)
    theta = gaussian(n, seed + 3)
    X = rows_of(H)
    # 2 / n X^T (X theta - y) = g
    y = X @ theta - torch.linalg.solve(X.T, g * n / 2)
    A = (values * rank / 2).sqrt()[:, None] * U
    return Toy(linear(theta), [(A, (A @ theta)[:, None])], [(X, y[:, None])], F, H, g, U, values)
