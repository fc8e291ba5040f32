"""The alignment loss: how far a model's answers on aligned data have moved from those it gave at the start.

    A(theta) = mean over counted terms of KL(p_0 || p)                for cross-entropy, in nats
    A(theta) = mean over elements of (z - z_0)^2                      for squared error

Both are zero with zero gradient at the start, and their Hessian there is the generalised Gauss-Newton matrix of the loss
on the same data, exactly; for cross-entropy it is the Fisher matrix. No label enters but by saying which terms count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from specdef.curvature.base import CurvatureOperator
from specdef.curvature.cross_entropy import IGNORE, chunks
from specdef.curvature.graph import plain_autograd, run_at
from specdef.curvature.losses import ClassificationLoss, LMLoss, MSELoss
from specdef.errors import SpecDefError

# Below this the series of log E exp(c) is summed without its first two terms, which cancel.
_SMALL = 0.5
# The floor, in units of what one rounding of every weight does: forward passes round about as often.
_FLOOR = 4.0


@final
class AlignmentLoss:
    """The alignment loss of a model on aligned batches, at displacements of its weights.

    Memory: the outputs of all counted terms, in the operator's type.

    Args:
        operator: Any curvature operator on the aligned batches: model, weights, data and loss are taken from it.

    Raises:
        SpecDefError: The model's outputs are not finite.
        ValueError: The loss is neither cross-entropy nor squared error.
    """

    def __init__(self, operator: CurvatureOperator) -> None:
        loss = operator.loss_function
        if not isinstance(loss, ClassificationLoss | LMLoss | MSELoss):
            raise ValueError(
                f"loss must be ClassificationLoss, LMLoss or MSELoss, got {type(loss).__name__}."
            )
        self.operator, self._squared = operator, isinstance(loss, MSELoss)
        self._targets = [loss.targets(batch) for batch in operator.batches]
        self._weights = self._present()
        self.num_losses = 0
        with plain_autograd(operator.device), torch.no_grad():
            self._original = [self._rows(self._weights, i) for i in range(len(self._targets))]
        if not all(bool(torch.isfinite(rows).all()) for rows in self._original):
            raise SpecDefError(
                "the model's outputs on the aligned data are NaN or infinite",
                hint="Check the weights and the data.",
            )

    def __call__(self, displacement: Tensor) -> float:
        """Return A at the weights plus a displacement.

        Cost: one forward pass over the aligned data.

        Args:
            displacement: `[n]`, in the order of the operator's parameters.

        Returns:
            Nats per term, or squared outputs; NaN or infinite where the outputs are.
        """
        return self._at(self._moved(displacement))

    def present(self) -> float:
        """Return A at the weights that the model has now, trained since or not.

        Cost: one forward pass over the aligned data.

        Returns:
            Nats per term, or squared outputs; NaN or infinite where the outputs are.
        """
        return self._at(self._present())

    def second_difference(self, forth: Tensor, back: Tensor) -> list[Tensor]:
        """Return z(forth) + z(back) - 2 z(0) of the outputs that count.

        Cost: two forward passes over the aligned data.

        Args:
            forth: Displacement `[n]`.
            back: Likewise.

        Returns:
            For every batch the differences, laid out as its outputs.
        """
        self.num_losses += 2
        found = [torch.zeros_like(rows) for rows in self._original]
        with plain_autograd(self.operator.device), torch.no_grad():
            for displacement in (forth, back):
                weights = self._moved(displacement)
                for i, original in enumerate(self._original):
                    found[i] += self._rows(weights, i) - original
        return found

    def seminorm(self, changes: Sequence[Tensor] | None = None) -> float:
        """Return |u|_B of changes u of the outputs: A is half its square, to leading order.

        B is the Hessian of the loss with respect to the outputs at the start.

        Args:
            changes: For every batch, laid out as its outputs; None for the outputs at the start themselves.

        Returns:
            The seminorm.
        """
        total = 0.0
        for original, rows in zip(self._original, changes or self._original, strict=True):
            if self._squared:
                total += 2 * float(rows.double().square().sum())
                continue
            for part in chunks(original):
                p, u = torch.softmax(original[part].double(), -1), rows[part].double()
                u = u - torch.linalg.vecdot(p, u)[:, None]
                total += float((p * u.square()).sum())
        return math.sqrt(total / self.operator.num_terms)

    def rounding_floor(self, seed: int = 0) -> float:
        """Estimate the value below which A is rounding: four times A where every weight is off by half a unit.

        Cost: one forward pass.

        Args:
            seed: Of the signs.

        Returns:
            Nats per term, or squared outputs; positive.
        """
        operator = self.operator
        theta = operator.flatten(operator.parameters)
        info = torch.finfo(operator.dtype)
        generator = torch.Generator().manual_seed(seed)
        signs = 2 * torch.randint(2, theta.shape, generator=generator).to(theta) - 1
        return max(_FLOOR * self(theta * signs * (info.eps / 2)), info.tiny)

    def _at(self, weights: dict[str, Tensor]) -> float:
        self.num_losses += 1
        total = 0.0
        with plain_autograd(self.operator.device), torch.no_grad():
            for i, original in enumerate(self._original):
                total += self._sum(original, self._rows(weights, i))
        return total / self.operator.num_terms

    def _present(self) -> dict[str, Tensor]:
        """Return every parameter and buffer as it is, in the operator's type."""
        model, dtype = self.operator.model, self.operator.dtype
        return {
            name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }

    def _moved(self, displacement: Tensor) -> dict[str, Tensor]:
        """Return every parameter and buffer, with the weights displaced."""
        operator = self.operator
        moved = operator.unflatten(displacement.detach().to(operator.device, operator.dtype))
        return {**self._weights, **{name: self._weights[name] + d for name, d in moved.items()}}

    def _rows(self, weights: dict[str, Tensor], index: int) -> Tensor:
        """Return the outputs that count: `[k, C]` logits, or `[k]` elements."""
        operator, targets = self.operator, self._targets[index]
        loss, batch = operator.loss_function, operator.batches[index]
        outputs = run_at(
            operator.model, weights, lambda model: loss.outputs(model, batch), dtype=operator.dtype
        )
        if self._squared:
            return outputs.to(operator.dtype).reshape(-1)
        return outputs[targets != IGNORE].to(operator.dtype)

    def _sum(self, original: Tensor, rows: Tensor) -> float:
        if self._squared:
            return float((rows.double() - original.double()).square().sum())
        return sum(float(kl_terms(original[part], rows[part]).sum()) for part in chunks(original))


def kl_terms(original: Tensor, logits: Tensor) -> Tensor:
    """Return KL(softmax(original) || softmax(logits)) of every row, exact to rounding also where it is tiny.

    With p = softmax(original) and c = logits - original less its mean under p, KL = log E_p exp(c), and for small c
    log(1 + E_p[exp(c) - 1 - c]): nothing of the size of the logits cancels.

    Args:
        original: `[k, C]`.
        logits: `[k, C]`.

    Returns:
        `[k]` float64, nats, not negative but by rounding.

    Example:
        >>> kl_terms(torch.zeros(1, 2), torch.tensor([[1e-6, 0.0]]))  # x^2 / 8
        tensor([1.2500e-13], dtype=torch.float64)
    """
    z = original.double()
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    c = logits.double() - z
    # Twice: the mean of what is left of the first subtraction is rounding of numbers no larger than itself.
    for _ in range(2):
        c = c - torch.linalg.vecdot(p, c)[:, None]
    small = torch.log1p((p * (torch.expm1(c) - c)).sum(-1))
    large = torch.logsumexp(log_p + c, -1)
    return torch.where(c.abs().amax(-1) < _SMALL, small, large)
