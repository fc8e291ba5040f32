"""The sensitive subspace of the weights as they are now: measured and turned along during a fine-tune."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from specdef.curvature.linear import SymmetricOperator
from specdef.curvature.operators import GGNOperator
from specdef.fragility.alignment import AlignmentLoss
from specdef.fragility.subspace import FisherSubspace


@final
class AlignedData:
    """Aligned data beside a model that is being trained: its alignment loss now, and its sensitive directions now.

    Memory: the outputs of all counted terms; the graph only while directions are turned.

    Args:
        operator: The Gauss-Newton matrix of the aligned data on the model itself. What the model answers now is what it is
            compared with later.

    Raises:
        SpecDefError: The outputs are not finite.
    """

    def __init__(self, operator: GGNOperator) -> None:
        self.operator = operator
        self._alignment = AlignmentLoss(operator)

    def loss(self) -> float:
        """Return the alignment loss of the present weights: KL in nats per term, or the mean squared difference of outputs.

        Cost: a forward pass over the aligned data.

        Returns:
            The loss; NaN or infinite where the outputs are.
        """
        return self._alignment.present()

    def turned(self, rows: Tensor, metric: Tensor | None) -> Tensor | None:
        """Return rows turned towards the leading eigenvectors at the present weights: one step of subspace iteration.

        Cost: a product with the Gauss-Newton matrix per row.

        Args:
            rows: `[d, n]`, in the coordinates phi = P^(1/2) theta.
            metric: p^(1/2) `[n]`; None for ones.

        Returns:
            `[d, n]`, orthonormal; None where a product is not finite or the products are linearly dependent.
        """
        self.operator.refresh()
        m = 1.0 if metric is None else metric.to(self.operator.device, self.operator.dtype)
        products = torch.stack([(self.operator @ (row / m)) / m for row in rows.to(self.operator.dtype)])  # fmt: skip
        self.operator.refresh()  # the next step of training needs the graph's memory
        if not bool(torch.isfinite(products).all()):
            return None
        basis: Tensor
        basis, R = torch.linalg.qr(products.T)
        sizes = R.diagonal().abs()
        if float(sizes.min()) <= torch.finfo(R.dtype).eps * float(sizes.max()):
            return None
        return basis.T.contiguous()


def coupled_directions(subspace: FisherSubspace, hessian: SymmetricOperator) -> Tensor:
    """Return H~ U, the directions in which the gradient of a fine-tuning loss grows into the sensitive subspace.

    Without a projection the path bends into M by t^2/2 U H~ g~, which vanishes when g~ is orthogonal to these directions.

    Cost: a product with the Hessian per row.

    Args:
        subspace: U and its metric.
        hessian: H of the fine-tuning loss, in the weights' own units.

    Returns:
        `[d, n]`, in the coordinates phi; not orthonormal.
    """
    m = 1.0 if subspace.metric is None else subspace.metric.to(hessian.device, hessian.dtype)
    return torch.stack([(hessian @ (u.to(hessian.device, hessian.dtype) / m)) / m for u in subspace.vectors])  # fmt: skip
