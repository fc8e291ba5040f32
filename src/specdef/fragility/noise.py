"""What single batches add to the alignment loss when each step sees one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from specdef.curvature.linear import SymmetricOperator
from specdef.fragility.path import speed
from specdef.fragility.task import Metric, TaskLoss
from specdef.rates.linear import Optimizer

DEVIATIONS = 4
"""Batches whose gradient is looked at, at most."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What the batches of a pass differ by.

    Args:
        variance: tr(F C), C the covariance of the batch gradient over a pass; in the metric.
        num_batches: Batches of a pass.
    """

    variance: float = 0.0
    num_batches: int = 1

    def added(self, optimizer: Optimizer, learning_rate: float, steps: Sequence[int]) -> Tensor:
        """Return what the batches seen so far, more often than others, add to the alignment loss in expectation.

        After whole passes every batch has been seen alike. k steps into one, drawn in random order without replacement, the
        sum of deviations has covariance k (B - k) / (B - 1) C.

        Args:
            optimizer: The method; momentum sums the deviations up.
            learning_rate: Its rate.
            steps: Step numbers.

        Returns:
            `[s]` float64.
        """
        B = self.num_batches
        k = torch.tensor(list(steps), dtype=torch.float64) % B
        scale = (learning_rate * speed(optimizer)) ** 2 / 2 * self.variance
        return scale * k * (B - k) / max(1, B - 1)


def measure_noise(
    task: TaskLoss, gradient: Tensor, metric: Metric, fisher: SymmetricOperator, seed: int
) -> Noise:
    """Estimate tr(F C) from the deviations of at most 4 batches: the mean of (g_b - g)^T F (g_b - g).

    Cost: a gradient of one batch and a product with F for each of them; none for full batches.

    Args:
        task: The task.
        gradient: Its gradient g `[n]`, in theta's coordinates.
        metric: The metric.
        fisher: F in the metric.
        seed: Of the choice of batches.

    Returns:
        The noise.
    """
    B = len(task.parts)
    if B == 1:
        return Noise()
    chosen = torch.randperm(B, generator=torch.Generator().manual_seed(seed))[:DEVIATIONS].tolist()
    total = 0.0
    for b in chosen:
        deviation = metric.scale(task.step_gradient(b, None) - gradient)
        total += float((deviation.double() * (fisher @ deviation).double()).sum())
    return Noise(variance=max(0.0, total / len(chosen)), num_batches=B)
