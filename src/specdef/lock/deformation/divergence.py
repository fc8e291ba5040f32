"""KL divergence between two sets of logits, with its gradient in closed form, a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specdef.curvature.cross_entropy import chunks


def kl_terms(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) of every row, in nats.

    The gradient with respect to the student's logits is softmax(student) - softmax(teacher); the teacher gets none.

    Args:
        teacher: `[n, C]`, logits.
        student: `[n, C]`, logits.

    Returns:
        `[n]`, not negative up to rounding.

    >>> kl_terms(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
    tensor([0.1201])
    """
    terms: Tensor = _Divergence.apply(teacher, student)  # type: ignore[no-untyped-call]
    return terms


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor) -> Tensor:
        ctx.save_for_backward(teacher, student)
        terms = student.new_empty(len(student))
        for rows in chunks(student):
            log_p, log_q = teacher[rows].log_softmax(-1), student[rows].log_softmax(-1)
            terms[rows] = torch.linalg.vecdot(log_p.exp(), log_p - log_q)
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[None, Tensor]:
        teacher, student = ctx.saved_tensors
        out = torch.empty_like(student)
        for rows in chunks(student):
            difference = torch.softmax(student[rows], -1) - torch.softmax(teacher[rows], -1)
            torch.mul(difference, weights[rows][:, None], out=out[rows])
        return None, out
