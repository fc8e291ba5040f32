"""Re-balance, then clip: what undoes a lock along the symmetries that was put on top of raised singular values."""

from __future__ import annotations

import torch
from torch import nn

from specdef.attacks.attack import Prepared
from specdef.attacks.structural.clip_spectrum import ClipSpectrum
from specdef.attacks.structural.rebalance import Rebalance, rebalance
from specdef.attacks.task import Task


class RebalanceClip(ClipSpectrum):
    """Re-balance, clip the spectrum of every matrix, then train everything.

    In this order: while a channel is scaled, the largest singular values of the matrix that makes it are that channel, and
    clipping meets it instead of what was raised.

    Args:
        k: Values that may be clipped, as in `ClipSpectrum`.
    """

    name = "rebalance-clip"
    cost = "a pass over the weights and a singular value decomposition per matrix, once"
    source = (
        "rebalance and clip-spectrum, one after the other: a lock on top of a lock asks for both"
    )
    summary = "equalise channels, then clip the top singular values of every matrix, then train all"

    def applies(self, model: nn.Module) -> str:
        """Return why one of the two makes no sense."""
        return Rebalance().applies(model) or super().applies(model)

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Re-balance, clip, then train everything."""
        rebalance(model)
        return super().prepare(model, task, original=original, generator=generator)
