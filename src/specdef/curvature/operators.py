"""Hessian, generalised Gauss-Newton and empirical Fisher matrix of a model's loss, by products with vectors.

A product on a kept graph costs two gradients for the Hessian and four thirds of one for the others: six and four
matrix products per linear layer where a gradient takes three.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from specdef.curvature.base import CurvatureOperator as CurvatureOperator
from specdef.curvature.fused import FusedLayers
from specdef.curvature.graph import check_twice_differentiable, grad, widen
from specdef.curvature.losses import Batch, Loss
from specdef.curvature.parameters import Params


@final
class HessianOperator(CurvatureOperator):
    """The Hessian of the mean loss. A product costs about two gradients on a kept graph, three without one.

    See `CurvatureOperator` for the arguments.

    Example:
        The Hessian of (w x - y)^2 is 2 x^2:

        >>> from specdef.curvature.losses import MSELoss
        >>> net = nn.Linear(1, 1, bias=False)
        >>> H = HessianOperator(net, [(torch.tensor([[3.0]]), torch.tensor([[1.0]]))], MSELoss())
        >>> H @ torch.ones(1)
        tensor([18.])
    """

    def _build(self, index: int) -> list[Tensor]:
        with FusedLayers(self._target):
            value = self._sum({**self._weights, **self._leaves}, index) / self.num_terms
        gradients = list(grad(value, list(self._leaves.values()), create_graph=True))
        check_twice_differentiable(gradients)
        return gradients

    def _product(self, graph: list[Tensor], v: Tensor, *, keep: bool) -> tuple[Tensor | None, ...]:
        # A gradient that does not depend on any parameter has no graph, and contributes nothing.
        parts = [(g, u) for g, u in zip(graph, self.unflatten(v).values(), strict=True) if g.requires_grad]  # fmt: skip
        if not parts:
            return (None,) * len(graph)
        gradients, vectors = zip(*parts, strict=True)
        return grad(gradients, list(self._leaves.values()), vectors, retain_graph=keep, unused=True)


@dataclass
class _Jacobian:
    """Outputs z with J^T u as a function of a placeholder u: two backward passes give J v and J^T w = J^T B J v."""

    outputs: Tensor
    placeholder: Tensor
    transposed: list[Tensor]
    product: Tensor  # memory for w: fresh pages for every product cost as much as the arithmetic


class _OutputOperator(CurvatureOperator):
    """(1/N) sum J^T B J with a matrix B on the outputs."""

    @abstractmethod
    def _output_product(self, outputs: Tensor, index: int, u: Tensor, out: Tensor) -> Tensor:
        """Return B u for the outputs of one batch, in `out`."""

    def _build(self, index: int) -> tuple[int, _Jacobian]:
        with FusedLayers(self._target):
            z = widen(
                self._outputs({**self._weights, **self._leaves}, index), self.dtype
            ).contiguous()
        u = torch.zeros_like(z, requires_grad=True)
        transposed = grad(z, list(self._leaves.values()), u, create_graph=True)
        check_twice_differentiable(transposed)
        # The shapes and labels are checked where the loss is evaluated.
        with torch.no_grad():
            self.loss_function.terms(z, self._targets[index])
        return index, _Jacobian(z, u, list(transposed), torch.empty_like(z))

    def _product(
        self, graph: tuple[int, _Jacobian], v: Tensor, *, keep: bool
    ) -> tuple[Tensor | None, ...]:
        index, jacobian = graph
        parts = [(t, d) for t, d in zip(jacobian.transposed, self.unflatten(v).values(), strict=True) if t.requires_grad]  # fmt: skip
        leaves = list(self._leaves.values())
        if not parts:
            return (None,) * len(leaves)
        transposed, vectors = zip(*parts, strict=True)
        self._target.tangents_only = True
        try:
            (jv,) = grad(transposed, [jacobian.placeholder], vectors, retain_graph=True)
        finally:
            self._target.tangents_only = False
        w = self._output_product(jacobian.outputs.detach(), index, jv, jacobian.product)
        w = w.div_(self._normaliser())
        return grad(jacobian.outputs, leaves, w, retain_graph=keep, unused=True)


@final
class GGNOperator(_OutputOperator):
    """The generalised Gauss-Newton matrix (1/N) sum J^T B J, B the Hessian of the loss with respect to the outputs.

    Positive semi-definite for the losses here, where it equals the Fisher matrix up to the loss's constant. A product
    costs about 4/3 of a gradient on a kept graph: J v by differentiating J^T u with respect to u, and B in closed form.
    See `CurvatureOperator` for the arguments.
    """

    def _output_product(self, outputs: Tensor, index: int, u: Tensor, out: Tensor) -> Tensor:
        return self.loss_function.output_hessian_product(outputs, self._targets[index], u, out)


@final
class EmpiricalFisherOperator(_OutputOperator):
    """The empirical Fisher matrix: the mean of g g^T over gradients g of single terms, or of single samples.

    Args:
        model: As for `CurvatureOperator`, like all arguments but the last.
        batches: Likewise.
        loss: Likewise.
        params: Likewise.
        per: "term" for the gradient of each term's loss (each token of a language model); "sample" for the gradient
            of each sample's mean loss (each row of the batch).
        dtype: Likewise.
        memory_limit: Likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        loss: Loss,
        params: Params = None,
        *,
        per: str = "term",
        dtype: torch.dtype | None = None,
        memory_limit: int | None = None,
    ) -> None:
        if per not in ("term", "sample"):
            raise ValueError(f'per must be "term" or "sample", got {per!r}.')
        super().__init__(model, batches, loss, params, dtype=dtype, memory_limit=memory_limit)
        self.per = per
        self._counts = [
            torch.tensor([loss.count(row) for row in targets], device=self.device)
            for targets in self._targets
        ]
        self._num_samples = sum(int((counts > 0).sum()) for counts in self._counts)

    def _normaliser(self) -> float:
        return self.num_terms if self.per == "term" else self._num_samples

    def _output_product(self, outputs: Tensor, index: int, u: Tensor, out: Tensor) -> Tensor:
        targets = self._targets[index]
        gradient = self.loss_function.output_gradient(outputs, targets)
        if self.per == "term":
            # A term's gradient lives in its own row of outputs; with one element per term, in that element.
            inner = gradient * u
            if outputs.numel() > targets.numel():
                inner = inner.sum(-1, keepdim=True)
            return torch.mul(gradient, inner, out=out)
        rows, counts = gradient.reshape(len(targets), -1), self._counts[index]
        inner = torch.linalg.vecdot(rows, u.reshape(rows.shape)) / counts.clamp_min(1) ** 2
        return torch.mul(rows, inner[:, None], out=out.view(rows.shape)).view(outputs.shape)
