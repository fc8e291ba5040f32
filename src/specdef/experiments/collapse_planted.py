"""A model whose alignment collapses by the quartic law, with every quantity of the law known in closed form.

Linear regression: the squared error of aligned rows A theta has the Hessian F = 2/m A^T A, that of the task's rows X theta - y the Hessian H and
gradient g, so that F, H and g can be planted: F of rank d, g with a given share in its eigenspace M, H dense, so that P H g is not zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import specdef

DOUBLE = torch.float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A model, its data, and what is true of it.

    Args:
        model: Linear.
        aligned: One batch.
        task: One batch.
        truth: initial_overlap, gamma, lambda_min, gradient_norm.
    """

    model: nn.Module
    aligned: list[Any]
    task: list[Any]
    truth: dict[str, float]


def planted_regression(*, n: int = 40, rank: int = 4, overlap: float, seed: int = 0) -> Planted:
    """Plant F, H and g.

    Args:
        n: Weights.
        rank: Of F.
        overlap: |P g| / |g|.
        seed: Of eigenvectors and directions.

    Returns:
        The model with its truth, in float64.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    U = torch.linalg.qr(draw(n, n))[0].T[:rank]
    values = torch.linspace(4, 1, rank, dtype=DOUBLE)
    Q = torch.linalg.qr(draw(n, n))[0]
    root = Q * torch.linspace(0.1, 1, n, dtype=DOUBLE).sqrt()  # H = root root^T
    inside, outside = U.T @ draw(rank), draw(n)
    outside = outside - U.T @ (U @ outside)
    g = overlap * inside / inside.norm() + math.sqrt(1 - overlap**2) * outside / outside.norm()
    theta = draw(n)
    X = root.T * math.sqrt(n / 2)
    y = X @ theta - torch.linalg.solve(X.T, g * n / 2)
    A = (values * rank / 2).sqrt()[:, None] * U
    model = nn.Linear(n, 1, bias=False, dtype=DOUBLE)
    with torch.no_grad():
        model.weight.copy_(theta[None])
    gamma = float((values * (U @ (root @ (root.T @ g))) ** 2).sum().sqrt())
    truth = {"initial_overlap": overlap, "gamma": gamma, "lambda_min": 1.0, "gradient_norm": 1.0}
    return Planted(
        model=model, aligned=[(A, (A @ theta)[:, None])], task=[(X, y[:, None])], truth=truth
    )


def planted_results(seed: int) -> list[dict[str, Any]]:
    """Diagnose and observe three planted runs: no overlap, overlap, and a rate beyond what is stable.

    Args:
        seed: Of the models.

    Returns:
        One entry for each: name, truth, largest relative error of the estimates, and the report.
    """
    found = []
    for name, overlap, rate, steps in (
        ("no overlap", 0.0, 1e-3, 100), ("overlap", 0.3, 1e-3, 100), ("beyond the stable rate", 0.0, 2.5, 20),
    ):  # fmt: skip
        toy = planted_regression(overlap=overlap, seed=seed)
        report = specdef.fragility(
            toy.model, toy.aligned, toy.task, learning_rate=rate, steps=steps, krylov_steps=20, observe=True, seed=seed,
            task_name=name,
        )  # fmt: skip
        errors = {
            quantity: abs(getattr(report, quantity) - true) / max(true, 1e-3)
            for quantity, true in toy.truth.items()
        }
        found.append({"name": name, "truth": toy.truth, "errors": errors, "report": report.to_dict()})  # fmt: skip
    return found
