"""AdaHessian: Yao et al. 2021, "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning", arXiv 2006.00719."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdef.attacks.optimizers.base import Params, PerTensorCurved, signs


class AdaHessian(PerTensorCurved):
    """Adam with the squared diagonal of the Hessian in place of the squared gradient: equations (8) to (11), k = 1.

    The diagonal is Hutchinson's z * (H z) with random signs z, averaged over a convolution's kernel.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        weight_decay: Decoupled.
        max_grad_norm: Norm gradients are clipped to.
        betas: Of the two moments.
        eps: Added to the root of the second; that of the authors' program. Much less, and a net sure of wrong answers, whose loss is
            all but linear, diverges at every rate that moves it.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
    ) -> None:
        super().__init__(
            params, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm, betas=betas, eps=eps,
        )  # fmt: skip

    def draw(self, parameter: Tensor) -> Tensor:
        """Draw signs."""
        return signs(parameter, self.generator)

    def update(
        self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move by the momentum over the curvature's size."""
        if "m" not in state:
            state.update(m=torch.zeros_like(grad), v=torch.zeros_like(grad), step=0)
        diagonal = state.pop("probe") * state.pop("product")
        if diagonal.ndim == 4:
            diagonal = diagonal.mean((2, 3), keepdim=True).expand_as(grad)
        b1, b2 = group["betas"]
        state["step"] += 1
        m = state["m"].lerp_(grad, 1 - b1) / (1 - b1 ** state["step"])
        v = state["v"].lerp_(diagonal.square(), 1 - b2) / (1 - b2 ** state["step"])
        parameter.sub_(m / (v.sqrt_() + group["eps"]), alpha=group["lr"])
