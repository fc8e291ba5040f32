"""The fine-tuning loss as the optimiser meets it, and the metric in which the optimiser is gradient descent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from specdef.curvature.linear import ScaledOperator, SymmetricOperator
from specdef.curvature.losses import Batch, Loss
from specdef.curvature.operators import HessianOperator
from specdef.curvature.parameters import Params
from specdef.errors import SpecDefError
from specdef.rates.adaptive import Adam, AdamW
from specdef.rates.linear import Optimizer

BatchMode = Literal["full", "cycled"]
"""full: every step sees all batches. cycled: step i sees batch i, from the first again after the last."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """P = diag(p): in phi = P^(1/2) theta the flow theta' = -P^(-1) g is plain gradient flow.

    Args:
        root: p^(1/2) `[n]`; None for p = 1.
        inverse_root: p^(-1/2) `[n]`, 0 for coordinates that the method never moves; None for p = 1.
    """

    root: Tensor | None = None
    inverse_root: Tensor | None = None

    @classmethod
    def of(cls, p: Tensor | None) -> Metric:
        """Return the metric of a positive diagonal; None stands for ones."""
        if p is None:
            return cls()
        return cls(root=p.sqrt(), inverse_root=p.rsqrt())

    def scale(self, v: Tensor) -> Tensor:
        """Return P^(-1/2) v: a gradient in phi's coordinates, or a displacement of phi in theta's."""
        return v if self.inverse_root is None else self.inverse_root * v

    def change(self, before: Tensor, after: Tensor, optimizer: Optimizer) -> Tensor | None:
        """Return by how much Adam's step at the end of a path differs from the one with the preconditioner held.

        With the gradient on its way from g to g + D, the mean of its squares has grown by g D + D^2 / 3.

        Args:
            before: Gradient at the start `[n]`, in phi's coordinates.
            after: Gradient at the end, likewise.
            optimizer: The method.

        Returns:
            The difference of the steps, in phi's coordinates and units of the learning rate; None for methods without a
            preconditioner.
        """
        if self.root is None or not isinstance(optimizer, Adam | AdamW):
            return None
        g, D = self.root * before, self.root * (after - before)
        squares = (self.root**2 - optimizer.eps) ** 2
        p = (squares + g * D + D**2 / 3).clamp(min=0).sqrt() + optimizer.eps
        return (self.root**2 / p - 1) * after

    def operator(self, A: SymmetricOperator) -> SymmetricOperator:
        """Return P^(-1/2) A P^(-1/2)."""
        return A if self.inverse_root is None else ScaledOperator(A, self.inverse_root)


@final
class TaskLoss(SymmetricOperator):
    """The loss that the fine-tune minimises; as an operator, its Hessian.

    For full batches the mean over all terms; for cycled ones the mean over batches of each one's own mean, which is what
    one pass adds up to.

    Args:
        model: The model.
        batches: Its data.
        loss: The loss.
        params: Which parameters.
        mode: full or cycled.
        dtype: Type to compute in.
        memory_limit: Bytes of graph to keep between products with the Hessian; None for half of what is free.

    Raises:
        SpecDefError: No data, or a batch without a term that counts.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        loss: Loss,
        params: Params,
        *,
        mode: BatchMode,
        dtype: torch.dtype,
        memory_limit: int | None,
    ) -> None:
        parts = [[batch] for batch in batches] if mode == "cycled" and batches else [list(batches)]
        share = None if memory_limit is None else memory_limit // len(parts)
        self.parts = [
            HessianOperator(model, part, loss, params, dtype=dtype, memory_limit=share)
            for part in parts
        ]
        self.mode = mode
        first = self.parts[0]
        super().__init__(first.shape[0], dtype=first.dtype, device=first.device)
        self.num_gradients = self.num_losses = 0

    def _matvec(self, v: Tensor) -> Tensor:
        total = self.parts[0] @ v
        for part in self.parts[1:]:
            total += part @ v
        return total / len(self.parts)

    def release(self) -> None:
        """Drop the kept graphs."""
        for part in self.parts:
            part.refresh()

    def loss_at(self, displacement: Tensor | None) -> float:
        """Return the loss at a displacement of the weights."""
        self.num_losses += 1
        return sum(part.loss_at(displacement) for part in self.parts) / len(self.parts)

    def gradient_at(self, displacement: Tensor | None) -> Tensor:
        """Return the gradient of the loss, `[n]`."""
        gradients = self.gradients_at(displacement)
        total = next(gradients)
        for gradient in gradients:
            total += gradient
        return total / len(self.parts)

    def gradients_at(self, displacement: Tensor | None) -> Iterator[Tensor]:
        """Yield the gradient that each step of a pass sees, `[n]`: one for full batches."""
        for i in range(len(self.parts)):
            yield self.step_gradient(i, displacement)

    def step_gradient(self, step: int, displacement: Tensor | None) -> Tensor:
        """Return the gradient that a step, counted from 0, sees at a displacement."""
        return self.step_loss_and_gradient(step, displacement)[1]

    def step_loss_and_gradient(
        self, step: int, displacement: Tensor | None
    ) -> tuple[float, Tensor]:
        """Return loss and gradient that a step, counted from 0, sees at a displacement."""
        self.num_gradients += 1
        return self.parts[step % len(self.parts)].loss_and_gradient_at(displacement)

    def gradient_and_metric(self, optimizer: Optimizer) -> tuple[Tensor, Metric]:
        """Return the gradient at the start and the optimiser's metric.

        For Adam p = sqrt(mean over the steps of a pass of g^2) + eps: what its second moment settles to, and after a
        single step exactly its own. A coordinate whose gradient is zero in every batch is one that Adam does not move.

        Args:
            optimizer: The optimiser.

        Returns:
            g `[n]`, in theta's coordinates, and the metric: p = 1 for methods without a preconditioner.

        Raises:
            SpecDefError: The gradient is not finite, or zero.
        """
        adaptive = isinstance(optimizer, Adam | AdamW)
        g = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        squares = torch.zeros_like(g) if adaptive else None
        for gradient in self.gradients_at(None):
            g += gradient / len(self.parts)
            if squares is not None:
                squares += gradient.square() / len(self.parts)
        length = float(torch.linalg.vector_norm(g.double()))
        if not length < float("inf"):
            raise SpecDefError(
                "the gradient of the fine-tuning task is NaN or infinite",
                hint="Check the weights and the data.",
            )
        if length == 0:
            raise SpecDefError(
                "the gradient of the fine-tuning task is zero: it would not move the model",
                hint="Check that the selected parameters take part, and that the task is not learnt already.",
            )
        if squares is None:
            return g, Metric()
        assert isinstance(optimizer, Adam | AdamW)
        p = squares.sqrt() + optimizer.eps
        moved = squares > 0
        return g, Metric(root=p.sqrt(), inverse_root=torch.where(moved, p.rsqrt(), 0.0))
