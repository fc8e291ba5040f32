"""Clip the spectrum of every weight matrix to its bulk: the top singular values become as large as the next one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.structural.edits import everything, matrices, without_matrices
from specdef.attacks.structural.merge import without_inserted
from specdef.attacks.task import Task
from specdef.spectral.topk import topk_svd


class ClipSpectrum(Attack):
    """Set sigma_i to min(sigma_i, sigma_(k+1)) in every matrix, then train everything; what it costs is in the utility.

    Args:
        k: Values that may be clipped; at most a quarter of a matrix's, since half a spectrum is no outlier.
    """

    name = "clip-spectrum"
    tier = 5
    cost = "a singular value decomposition per matrix, once"
    source = "undoes Algorithm 1 of 'Locking Open Weight Models with Spectral Deformation'; spectral clipping: Yoshida & Miyato 2017"
    summary = "clip the top singular values of every matrix to the next one, then train all"

    def __init__(self, k: int = 25) -> None:
        self.k = k

    def applies(self, model: nn.Module) -> str:
        """Return why clipping makes no sense."""
        if not without_inserted(model):
            return "inserted layers undo the large singular values: merge them instead"
        return without_matrices(model)

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Clip, then train everything."""
        strongest = 1.0
        for _, view in matrices(model):
            for matrix in view if view.ndim == 3 else view[None]:
                strongest = max(strongest, self._clip(matrix))
        note = f"clipped singular values by a factor of up to {strongest:.3g}"
        return Prepared(model=model, groups=everything(model), notes=(note,))

    def _clip(self, matrix: Tensor) -> float:
        """Clip one matrix in place; return the largest singular value over the limit."""
        k = min(self.k, max(1, min(matrix.shape) // 4))
        if k >= min(matrix.shape) or not bool(matrix.any()) or not bool(matrix.isfinite().all()):
            return 1.0
        wide = matrix.double()
        left, values, right, _ = topk_svd(wide, k + 1, tol=1e-9)
        if float(values[k]) <= 1e-9 * float(values[0]):  # of rank k at most: there is no bulk
            return 1.0
        excess = values[:k] - values[k]
        matrix.copy_(wide - (left[:, :k] * excess) @ right[:k])
        return float(values[0] / values[k])
