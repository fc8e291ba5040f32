"""Shampoo: Gupta, Koren & Singer 2018, "Preconditioned Stochastic Tensor Optimization", arXiv 1802.09568, Algorithm 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdef.attacks.optimizers.base import Params, PerTensor


class Shampoo(PerTensor):
    """L <- L + G G^T, R <- R + G^T G, W <- W - lr times the momentum of L^(-1/4) G R^(-1/4).

    A tensor is a matrix of its first dimension by the others. Of a matrix with one side above `max_size` the other alone is
    used, with power -1/2, as for a vector; with both above it, Adagrad.
    Sums are kept in float64: in float32 their rounding would pass for directions with small gradients.
    Cost: an eigendecomposition of both sides in every step: roots of an earlier step are steep where the new gradient is the first.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        weight_decay: Decoupled.
        momentum: Of heavy ball, as in the paper's experiments.
        eps: L and R begin as eps times the identity.
        max_size: Largest side.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eps: float = 1e-12,
        max_size: int = 1024,
    ) -> None:
        super().__init__(
            params, lr=lr, weight_decay=weight_decay, momentum=momentum, eps=eps, max_size=max_size
        )  # fmt: skip

    def update(
        self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move by the gradient between two roots."""
        G = grad.reshape(len(grad), -1) if grad.ndim else grad.reshape(1, 1)
        sides = [side for side in (0, 1) if 1 < G.shape[side] <= group["max_size"]]
        if not state:
            state.update(m=torch.zeros_like(grad))
            for side in sides:
                state[f"sum{side}"] = group["eps"] * torch.eye(G.shape[side]).to(G.device).double()
            if not sides:
                state["squares"] = torch.full_like(G, group["eps"])
        if not sides:
            direction = G / state["squares"].add_(G.square()).sqrt()
        else:
            direction = G
            for side in sides:
                D = G.double()
                total = state[f"sum{side}"].add_(D @ D.mT if side == 0 else D.mT @ D)
                root = inverse_root(total, 2 * len(sides), group["eps"]).to(G)
                direction = root @ direction if side == 0 else direction @ root
        state["m"].mul_(group["momentum"]).add_(direction.view_as(grad))
        parameter.sub_(state["m"], alpha=group["lr"])


def inverse_root(matrix: Tensor, power: int, floor: float) -> Tensor:
    """Return M^(-1/power) of a symmetric matrix.

    Args:
        matrix: `[n, n]`, positive up to rounding.
        power: The root.
        floor: Eigenvalues below are taken for it; they are rounding.

    Returns:
        `[n, n]`.

    >>> inverse_root(torch.diag(torch.tensor([16.0, 1.0])), 4, 0.0).diag()
    tensor([0.5000, 1.0000])
    """
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=floor).pow(-1 / power)) @ vectors.mT
    return root
