"""Lion: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, Program 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdef.attacks.optimizers.base import Params, PerTensor


class Lion(PerTensor):
    """w <- w - lr sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g.

    Args:
        params: Parameters or groups.
        lr: Learning rate: every number moves by exactly this much.
        weight_decay: Decoupled.
        betas: b1 and b2; the paper's.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, betas=betas)

    def update(
        self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move by the sign of a momentum."""
        if not state:
            state["m"] = torch.zeros_like(grad)
        b1, b2 = group["betas"]
        parameter.sub_(state["m"].lerp(grad, 1 - b1).sign_(), alpha=group["lr"])
        state["m"].lerp_(grad, 1 - b2)
