"""PSGD with an X-shaped preconditioner: Li 2022, "Black Box Lie Group Preconditioners for SGD", arXiv 2211.04422."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specdef.attacks.optimizers.base import Params, decay, differentiate, gaussian, wide


class XMat(torch.optim.Optimizer):
    """w <- w - lr Q^T Q m, with Q = diag(a) + antidiag(b) over all parameters as one vector, m a running mean of gradients.

    Q descends c(Q) = E[h^T P h + v^T P^-1 v], P = Q^T Q, h = H v, whose minimum is |H|^-1, along the Lie group of
    X-shaped matrices: dQ = E Q, with E the X-shaped part of (Q h)(Q h)^T - (Q^-T v)(Q^-T v)^T, scaled by a bound on the
    second derivative, `precond_lr` over the largest row sum of the two terms' absolute values.
    Cost: one Hessian product per step, seven vectors of memory.

    Args:
        params: Parameters or groups.
        lr: Learning rate; 1 would be Newton's step.
        weight_decay: Decoupled.
        max_grad_norm: Norm gradients are clipped to.
        momentum: Of the running mean, which is corrected for its start at 0.
        precond_lr: Rate at which Q is fitted.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        momentum: float = 0.9,
        precond_lr: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.max_grad_norm, self.momentum, self.precond_lr = max_grad_norm, momentum, precond_lr
        self.count = 0
        self.generator = torch.Generator().manual_seed(torch.initial_seed())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Returns the loss with its graph.

        Returns:
            The loss.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        probes = [gaussian(p, self.generator) for p in parameters]
        value, products = differentiate(closure, parameters, probes)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        g = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        v, h = _flat(probes), _flat(products)
        state = self.state[parameters[0]]  # of all: the vector is cut only when it is applied
        if not state:
            # P = Q^2 starts at |v| / |h|, the size of the inverse Hessian.
            size = (v.norm() / h.norm()).sqrt() if bool(h.any()) else torch.ones_like(v[0])
            state.update(m=torch.zeros_like(g), a=size.expand_as(g).clone(), b=torch.zeros_like(g))
        a, b = fit(state["a"], state["b"], v, h, self.precond_lr)
        self.count += 1
        m = state["m"].lerp_(g, 1 - self.momentum)
        state.update(a=a, b=b)
        y = a * m + b * m.flip(0)
        direction = (a * y + (b * y).flip(0)) / (1 - self.momentum**self.count)
        pieces = iter(direction.split([p.numel() for p in parameters]))
        for group in self.param_groups:
            for parameter in group["params"]:
                decay(parameter, group)
                parameter.sub_(next(pieces).view_as(parameter), alpha=group["lr"])
        return value


def fit(a: Tensor, b: Tensor, v: Tensor, h: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Take one step of Q = diag(a) + antidiag(b) towards E[h^T P h + v^T P^-1 v] least.

    Args:
        a: `[n]`.
        b: `[n]`; row i holds b[i] in column n - 1 - i.
        v: `[n]`, a probe.
        h: `[n]`, the Hessian times it.
        rate: Of the step, below 1.

    Returns:
        The new a and b.
    """
    # Q^T couples i with its mirror alone: [[a, b'], [b, a']], and so does its inverse.
    a_, b_, v_ = a.flip(0), b.flip(0), v.flip(0)
    q = a * h + b * h.flip(0)
    w = (a_ * v - b_ * v_) / (a * a_ - b * b_)
    q_, w_ = q.flip(0), w.flip(0)
    along, across = q.square() - w.square(), q * q_ - w * w_
    bound = (q.square() + w.square() + (q * q_).abs() + (w * w_).abs()).max()
    mu = rate / bound.clamp(min=torch.finfo(a.dtype).tiny)
    new_a = a - mu * (along * a + across * b_)
    new_b = b - mu * (along * b + across * a_)
    return new_a, new_b


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([wide(x).reshape(-1) for x in tensors])
