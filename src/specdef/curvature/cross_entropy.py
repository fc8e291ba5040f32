"""Cross-entropy with its first and second derivative in closed form, a few rows at a time.

With p = softmax(z) and the target as the unit vector y: gradient p - y, Hessian diag(p) - p p^T. Autograd would keep
several copies of the logits for what these two lines say; over a language model's vocabulary they are the largest
tensors there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
"""Target of a row that does not count, as in torch and transformers."""

CHUNK = 1 << 18
"""Logits worked on at once: 1 MiB in float32, which stays in the cache."""


def cross_entropy_terms(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of every row, in nats; it can be differentiated twice.

    Args:
        logits: `[n, C]`, floating.
        targets: `[n]`, class indices in [0, C), or -100 for a row that does not count.

    Returns:
        `[n]`, zero where the row does not count.

    Example:
        >>> cross_entropy_terms(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor([1.3863, 0.0000])
    """
    terms: Tensor = _Terms.apply(logits, targets)  # type: ignore[no-untyped-call]
    return terms


def cross_entropy_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of sum(weights * terms) with respect to the logits: weights (p - y).

    Args:
        logits: `[n, C]`.
        targets: `[n]`.
        weights: `[n]`.

    Returns:
        `[n, C]`.
    """
    out = torch.empty_like(logits)
    for rows in chunks(logits):
        z, t = logits[rows], targets[rows]
        valid = t != IGNORE
        p = torch.softmax(z, -1, out=out[rows])
        p.scatter_add_(1, t.clamp_min(0)[:, None], -torch.ones_like(p[:, :1]))
        p.mul_((weights[rows] * valid)[:, None])
    return out


def cross_entropy_hessian_product(
    logits: Tensor, targets: Tensor, weights: Tensor, u: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return the Hessian of sum(weights * terms) with respect to the logits, times u: weights (p u - p <p, u>).

    Args:
        logits: `[n, C]`.
        targets: `[n]`; only whether a row counts matters.
        weights: `[n]`.
        u: `[n, C]`.
        out: `[n, C]`, where to write; None for new memory.

    Returns:
        `[n, C]`.
    """
    out = torch.empty_like(logits) if out is None else out
    for rows in chunks(logits):
        p = torch.softmax(logits[rows], -1)
        weight = (weights[rows] * (targets[rows] != IGNORE))[:, None]
        mean = torch.linalg.vecdot(p, u[rows])[:, None]
        torch.sub(u[rows], mean, out=out[rows]).mul_(p).mul_(weight)
    return out


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        terms = logits.new_empty(len(logits))
        for rows in chunks(logits):
            z, t = logits[rows], targets[rows]
            picked = z.gather(1, t.clamp_min(0)[:, None])[:, 0]
            terms[rows] = (torch.logsumexp(z, -1) - picked) * (t != IGNORE)
        return terms

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        return _Gradient.apply(logits, targets, weights), None  # type: ignore[no-untyped-call]


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets, weights)
        return cross_entropy_gradient(logits, targets, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        logits, targets, weights = ctx.saved_tensors
        by_logits = by_weights = None
        if ctx.needs_input_grad[0]:
            by_logits = cross_entropy_hessian_product(logits, targets, weights, u)
        if ctx.needs_input_grad[2]:
            ones = torch.ones_like(weights)
            by_weights = torch.linalg.vecdot(cross_entropy_gradient(logits, targets, ones), u)
        return by_logits, None, by_weights


def chunks(logits: Tensor) -> Iterator[slice]:
    """Yield slices of rows of about CHUNK logits each."""
    rows = max(1, CHUNK // max(1, logits.shape[1]))
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)
