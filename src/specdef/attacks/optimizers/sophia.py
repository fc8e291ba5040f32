"""Sophia-H: Liu et al. 2023, "Sophia: A Scalable Stochastic Second-order Optimizer", arXiv 2305.14342, Algorithms 1 and 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdef.attacks.optimizers.base import Params, PerTensorCurved, gaussian


class Sophia(PerTensorCurved):
    """w <- w - lr clip(m / max(gamma h, eps), 1), h a running mean of Hutchinson's estimate u * (H u) of the diagonal.

    Args:
        params: Parameters or groups.
        lr: Learning rate: no number moves by more.
        weight_decay: Decoupled.
        max_grad_norm: Norm gradients are clipped to.
        every: Steps between estimates; the paper's k.
        betas: Of m and h; the paper's.
        gamma: The paper's for Sophia-H; below it more numbers are clipped.
        eps: Keeps directions without curvature, or with a negative one, at the clip.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        every: int = 10,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(
            params, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm, every=every,
            betas=betas, gamma=gamma, eps=eps,
        )  # fmt: skip

    def draw(self, parameter: Tensor) -> Tensor:
        """Draw normal numbers."""
        return gaussian(parameter, self.generator)

    def update(
        self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move by the momentum over the curvature, clipped."""
        if "m" not in state:
            state.update(m=torch.zeros_like(grad), h=torch.zeros_like(grad))
        b1, b2 = group["betas"]
        m = state["m"].lerp_(grad, 1 - b1)
        if "product" in state:
            state["h"].lerp_(state.pop("probe") * state.pop("product"), 1 - b2)
        scale = (group["gamma"] * state["h"]).clamp_(min=group["eps"])
        parameter.sub_((m / scale).clamp_(-1, 1), alpha=group["lr"])
