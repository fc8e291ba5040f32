"""LAMB and LARS, whose steps are relative to each layer's norm.

LAMB: You et al. 2020, "Large Batch Optimization for Deep Learning", arXiv 1904.00962, Algorithm 2; LARS: its Algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdef.attacks.optimizers.base import Params, PerTensor


class LAMB(PerTensor):
    """w <- w - lr (|w| / |u|) u with u = Adam's direction + weight_decay w; the ratio is 1 where a norm is 0.

    Args:
        params: Parameters or groups; every tensor is a layer.
        lr: Learning rate: the step's norm over the weights'.
        weight_decay: Inside u, as in the paper.
        betas: Of the two moments.
        eps: Added to the root of the second moment.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)

    def _decay(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Leave it to the update."""

    def update(
        self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move along Adam's direction, as far as the layer is long."""
        if not state:
            state.update(m=torch.zeros_like(grad), v=torch.zeros_like(grad), step=0)
        b1, b2 = group["betas"]
        state["step"] += 1
        m = state["m"].lerp_(grad, 1 - b1) / (1 - b1 ** state["step"])
        v = state["v"].lerp_(grad.square(), 1 - b2) / (1 - b2 ** state["step"])
        direction = m / (v.sqrt_() + group["eps"])
        direction.add_(parameter, alpha=group["weight_decay"])
        parameter.sub_(trust_ratio(parameter, direction) * direction, alpha=group["lr"])


class LARS(PerTensor):
    """m <- b m + (1 - b)(g + weight_decay w); w <- w - lr (|w| / |m|) m; the ratio is 1 where a norm is 0.

    Args:
        params: Parameters or groups; every tensor is a layer.
        lr: Learning rate: the step's norm over the weights'.
        weight_decay: Added to the gradient, as in the paper.
        momentum: b.
    """

    def __init__(
        self, params: Params, *, lr: float, weight_decay: float = 0.0, momentum: float = 0.9
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum)

    def _decay(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Leave it to the update."""

    def update(
        self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move along the momentum, as far as the layer is long."""
        if not state:
            state["m"] = torch.zeros_like(grad)
        pull = grad.add(parameter, alpha=group["weight_decay"])
        m = state["m"].lerp_(pull, 1 - group["momentum"])
        parameter.sub_(trust_ratio(parameter, m) * m, alpha=group["lr"])


def trust_ratio(parameter: Tensor, direction: Tensor) -> Tensor:
    """Return |w| / |u|; 1 where either is 0."""
    length, other = parameter.norm().to(direction.dtype), direction.norm()
    return torch.where((length > 0) & (other > 0), length / other, torch.ones_like(other))
