"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796): the baseline of a quadratic pull to the start.

    L(theta) + (strength / 2) sum_i F_i (theta_i - theta0_i)^2

with the diagonal of the empirical Fisher matrix of the aligned data. Sensitive directions that are no coordinate axes are
spread over many weights, each of which is then held a little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from specdef.curvature.losses import Batch, Loss
from specdef.curvature.operators import GGNOperator
from specdef.curvature.parameters import Params, flat_slices, select_parameters
from specdef.errors import SpecDefError
from specdef.fragility.hooks import StepHook


@final
class EWCPenalty(StepHook):
    """The EWC penalty, as a gradient added before each step (`attach`) or as a term of the loss (`penalty`).

    Cost: a gradient per row of the aligned data, once. Memory: two copies of the parameters. As plain gradient descent on a
    quadratic it needs lr * strength * max F_i < 2.

    Args:
        model: The model, at the weights to stay near.
        batches: Aligned data, with the labels that the Fisher matrix takes its gradients at.
        loss: The loss.
        strength: Factor of the penalty; 1 makes it the diagonal model of the alignment loss.
        params: Which parameters, see `select_parameters`.

    Raises:
        ValueError: The strength is negative.
        SpecDefError: No term of the data counts.

    Example:
        >>> from specdef.curvature.losses import MSELoss
        >>> net = nn.Linear(1, 1, bias=False)
        >>> nn.init.ones_(net.weight).shape
        torch.Size([1, 1])
        >>> ewc = EWCPenalty(net, [(torch.tensor([[3.0]]), torch.tensor([[1.0]]))], MSELoss(), strength=2.0)
        >>> ewc.fisher["weight"]  # (2 (3 w - 1) 3)^2
        tensor([[144.]])
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        loss: Loss,
        strength: float,
        params: Params = None,
    ) -> None:
        super().__init__()
        if not strength >= 0:
            raise ValueError(f"strength must not be negative, got {strength}.")
        self.strength = strength
        self._parameters = select_parameters(model, params)
        self.fisher = diagonal_fisher(model, batches, loss, params)
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}

    def penalty(self) -> Tensor:
        """Return strength / 2 sum_i F_i (theta_i - theta0_i)^2, to be added to a loss.

        Returns:
            A scalar that can be differentiated.
        """
        terms = [
            (self.fisher[name] * (p - self._start[name]).square()).sum()
            for name, p in self._parameters.items()
        ]
        return self.strength / 2 * torch.stack(terms).sum()

    def _check(self, optimizer: Optimizer) -> None:
        for name, p in self._parameters.items():
            self._start[name] = self._start[name].to(p.device)
            self.fisher[name] = self.fisher[name].to(p.device)

    def _before_step(self) -> None:
        for name, p in self._parameters.items():
            if p.grad is not None:
                pull = self.fisher[name] * (p - self._start[name])
                p.grad.add_(pull, alpha=self.strength)


def diagonal_fisher(
    model: nn.Module, batches: Iterable[Batch], loss: Loss, params: Params = None
) -> dict[str, Tensor]:
    """Return (1/N) sum_s g_s^2 over rows s, g_s the gradient of the sum of a row's terms, N the number of terms.

    For one term per row it is the diagonal of the empirical Fisher matrix; for a row of tokens that of the sequence's
    log-likelihood, per token.

    Args:
        model: The model, unchanged.
        batches: The data; every tensor of a batch that is as long as its labels is cut into rows.
        loss: The loss.
        params: Which parameters, see `select_parameters`.

    Returns:
        Parameter name to a tensor of its shape.

    Raises:
        SpecDefError: No term counts.
    """
    parameters = select_parameters(model, params)
    total: Tensor | None = None
    num_terms = 0
    for batch in batches:
        for row in _rows(batch, len(loss.targets(batch))):
            if not loss.count(loss.targets(row)):
                continue
            operator = GGNOperator(model, [row], loss, params, memory_limit=0)
            square = (operator.gradient() * operator.num_terms).square()
            total = square if total is None else total.add_(square)
            num_terms += operator.num_terms
    if total is None:
        raise SpecDefError(
            "the aligned data has no term that counts",
            hint="Give at least one batch with a label that is not -100.",
        )
    total /= num_terms
    slices = flat_slices(parameters)
    return {name: total[slices[name]].view_as(p) for name, p in parameters.items()}


def _rows(batch: Batch, count: int) -> Iterable[Batch]:
    def cut(value: Any, i: int) -> Any:
        rowwise = isinstance(value, Tensor) and value.ndim and len(value) == count
        return value[i : i + 1] if rowwise else value

    for i in range(count):
        if isinstance(batch, Mapping):
            yield {name: cut(value, i) for name, value in batch.items()}
        else:
            yield cut(batch[0], i), cut(batch[1], i)
